"""The seed's puzzle, reproduced: why returning a cached tensor from a forward hook is no patched step.

The notebook ran the reliable definition with hooks on `resid_pre` at each layer in turn: none; a backward hook
that returned the cached reliable gradient; a forward hook that returned the cached unreliable activation; both.
Its recoveries were 1 everywhere for the first two, and for both of the others, to the last digit,
-.0589, .3849, .4423, .4417, .4414, .4386.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.config import (
    AliasConfig,
    PatchingConfig,
    PhaseConfig,
    PhasesConfig,
    PrimaryConfig,
    StudyConfig,
    ToyConfig,
)
from dynamics.sites import Site
from dynamics.steps.caching import recorded
from dynamics.steps.states import starting_point
from dynamics.steps.taps import exchanging
from dynamics.tasks import AliasTask
from tests.zoo.small_models import outcomes, same

pytestmark = pytest.mark.slow

N_LAYERS = 4
NOTEBOOK = partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.1)
ROWS = {"none": (False, False), "backward": (False, True), "forward": (True, False), "both": (True, True)}

every_layer = pytest.mark.parametrize("layer", range(N_LAYERS))


@pytest.fixture(scope="module")
def task():
    return AliasTask(
        StudyConfig(
            task=AliasConfig(modulus=12, multipliers=(2, 3, 4, 6), train_multipliers=2),
            model=ToyConfig(
                n_layers=N_LAYERS, n_heads=2, d_model=32, d_head=16, d_mlp=32, n_ctx=4, dtype="float64"
            ),
            phases=PhasesConfig(
                pretrain=PhaseConfig(steps=30),
                x1=PhaseConfig(steps=30),
                x2=PhaseConfig(steps=10),
                batch_size=64,
            ),
            patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
            seed=1,
        )
    )


@pytest.fixture(scope="module")
def recipe(task):
    """The notebook's step on a model trained up to X2: a new AdamW, clipping at 1."""
    training = task.recipe()
    after_x1 = dy.steps.advance(training, starting_point(training, None), 60, task.batch)
    model = task.model()
    after_x1.restore(model)
    return dy.Recipe(model, dy.measures.cross_entropy, NOTEBOOK, max_grad_norm=1.0)


def cut(layer):
    return f"blocks.{layer}.hook_resid_pre"


def upstream(model, layer):
    """Names of the parameters whose only way to the loss leads through the cut."""
    before = ("embed.", "pos_embed.", *(f"blocks.{i}." for i in range(layer)))
    return {name for name, _ in model.named_parameters() if name.startswith(before)}


def cached(model, tokens, loss, name):
    """Activation and gradient at a hook, detached, by TransformerLens's own caching hooks."""
    model = copy.deepcopy(model)
    cache, forward, backward = model.get_caching_hooks(names_filter=name, incl_bwd=True)
    with model.hooks(fwd_hooks=forward, bwd_hooks=backward):
        loss(model, tokens).backward()
    return cache[name].detach(), cache[f"{name}_grad"].detach()


def hooked_step(recipe, contrast, layer, row, optimizer=None, warm=0):
    """The notebook's row at one layer: the stepped model, and how often the hooks of the backward pass fired."""
    model, name, fired = copy.deepcopy(recipe.model), cut(layer), []
    unreliable, _ = cached(model, contrast.base, recipe.loss, name)
    _, reliable_gradient = cached(model, contrast.source, recipe.loss, name)
    stepping = (optimizer or recipe.optimizer)(model.parameters())
    for _ in range(warm):
        model.zero_grad()
        recipe.loss(model, contrast.base).backward()
        stepping.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.zero_grad()
    forward, backward = ROWS[row]

    def replaced(gradient, hook):
        fired.append("the hook at the cut")
        return reliable_gradient

    def counted(module, inputs, output):
        output.register_hook(lambda gradient: fired.append("a tensor upstream"))

    upstream_hook = model.hook_embed.register_forward_hook(counted)
    with model.hooks(
        fwd_hooks=[(name, lambda activation, hook: unreliable)] if forward else [],
        bwd_hooks=[(name, replaced)] if backward else [],
    ):
        recipe.loss(model, contrast.source).backward()
    upstream_hook.remove()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip.max_norm)
    stepping.step()
    return model, before, fired


def tensors(model):
    return {n: p.detach() for n, p in model.named_parameters()} | dict(model.named_buffers())


def measured(model, contrast):
    model.eval()
    with torch.no_grad():
        return dy.measures.correct_logit(model, contrast.probe).mean().item()


def references(recipe, contrast):
    """Base, source and untouched, each by its own ordinary step."""
    found = {"untouched": measured(copy.deepcopy(recipe.model), contrast)}
    for name in ("base", "source"):
        model = copy.deepcopy(recipe.model)
        stepping = recipe.optimizer(model.parameters())
        recipe.loss(model, getattr(contrast, name)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip.max_norm)
        stepping.step()
        found[name] = measured(model, contrast)
    return found


def recovery(value, base, source):
    return (value - base) / (source - base)


# --- a severed graph --------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("row", ["forward", "both"])
def test_a_forward_hook_that_returns_a_cached_tensor_severs_the_graph(task, recipe, layer, row):
    contrast = task.contrasts()[0]
    model, _, fired = hooked_step(recipe, contrast, layer, row)
    assert fired == []
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == upstream(model, layer)
    assert {"embed.W_E", "pos_embed.W_pos"} <= without


@every_layer
def test_with_the_graph_whole_the_same_hooks_do_fire(task, recipe, layer):
    contrast = task.contrasts()[0]
    model, _, fired = hooked_step(recipe, contrast, layer, "backward")
    assert sorted(fired) == ["a tensor upstream", "the hook at the cut"]
    assert all(p.grad is not None for p in model.parameters())


@every_layer
@pytest.mark.parametrize("warm", [0, 2], ids=["a new optimizer", "an optimizer with moments"])
def test_adamw_leaves_severed_parameters_as_they_are_to_the_bit_without_decay_or_momentum(
    task, recipe, layer, warm
):
    contrast = task.contrasts()[0]
    decaying = partial(NOTEBOOK, weight_decay=0.5)
    model, before, _ = hooked_step(recipe, contrast, layer, "forward", decaying, warm)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) - upstream(model, layer)


@every_layer
def test_forward_only_and_forward_and_backward_are_the_same_row_exactly(task, recipe, layer):
    for contrast in task.contrasts()[::4]:
        forward, both = (hooked_step(recipe, contrast, layer, row)[0] for row in ("forward", "both"))
        assert same(tensors(forward), tensors(both))
        assert measured(forward, contrast) == measured(both, contrast)


@every_layer
def test_backward_only_replaces_the_reliable_signals_by_themselves_and_recovers_exactly_1(
    task, recipe, layer
):
    for contrast in task.contrasts()[::4]:
        none, backward = (hooked_step(recipe, contrast, layer, row)[0] for row in ("none", "backward"))
        assert same(tensors(none), tensors(backward))
        known = references(recipe, contrast)
        assert known["source"] == measured(none, contrast)
        assert recovery(measured(backward, contrast), known["base"], known["source"]) == 1.0


# --- the recovery of no step at all -----------------------------------------------------------------------


def test_no_step_at_all_recovers_the_notebooks_441():
    untouched, base, source = 3.9090282917022705, 2.0656609535217285, 6.247903347015381
    assert recovery(untouched, base, source) == pytest.approx(0.441, abs=5e-4)
    assert recovery(3.909, 2.066, 6.248) == pytest.approx(0.441, abs=5e-4)
    plateau = [0.4423, 0.4417, 0.4414, 0.4386]
    assert max(abs(row - recovery(untouched, base, source)) for row in plateau) < 0.003


def test_every_result_reports_what_no_step_recovers(task, recipe):
    contrasts = task.contrasts()
    patched = sites.activations(recipe.model, "blocks.*.hook_resid_pre")
    result = dy.patch_signals(recipe, None, contrasts, patched, dy.measures.correct_logit)
    for i, contrast in enumerate(contrasts):
        for name, value in references(recipe, contrast).items():
            assert result[name].values[i] == pytest.approx(value, rel=1e-10)
    none = recovery(result["untouched"], result["base"], result["source"])
    assert (abs(none) > 0.01).all()


def test_a_late_cut_hardly_moves_the_model_so_its_row_lies_near_no_step(task, recipe):
    """Loosely: what remains to be stepped is the last block and the unembedding. At layer 0 all blocks are."""
    late, early = [], []
    for contrast in task.contrasts():
        known = references(recipe, contrast)
        first, last = (
            measured(hooked_step(recipe, contrast, layer, "forward")[0], contrast)
            for layer in (0, N_LAYERS - 1)
        )
        early.append(abs(first - known["untouched"]))
        late.append(abs(last - known["untouched"]))
    assert 0 < np.mean(late) < 0.3 * np.mean(early)


# --- beside it, the patched step --------------------------------------------------------------------------


def exchanged_gradients(recipe, contrast, layer, forward):
    state, name = starting_point(recipe, None), cut(layer)
    _, source = recorded(recipe, state, contrast.source, [name])
    taps = exchanging(Site("cut", {name: ...}), source, forward)
    return dy.steps.gradient(recipe, state, contrast.base, taps=taps).gradients


def close(one, other):
    return float((one - other).abs().max()) < 1e-12 * (1 + float(other.abs().max()))


@pytest.mark.parametrize("layer", range(1, N_LAYERS))
def test_an_exchanged_signal_goes_on_upstream_and_is_neither_runs_gradient_there(task, recipe, layer):
    contrast = task.contrasts()[0]
    state = starting_point(recipe, None)
    base, source = (dy.steps.gradient(recipe, state, b).gradients for b in (contrast.base, contrast.source))
    found = {forward: exchanged_gradients(recipe, contrast, layer, forward) for forward in ("base", "source")}
    above = upstream(recipe.model, layer)
    added = f"blocks.{layer - 1}.mlp.b_out"  # the signal reaches it through additions alone
    for name in above - {added}:
        for gradients in found.values():
            assert gradients[name] is not None
            if not name.endswith("b_K"):  # whose gradient is zero but for rounding
                assert not close(gradients[name], base[name])
                assert not close(gradients[name], source[name])
        assert close(
            found["base"][name], found["source"][name]
        )  # J_base transposed, times the source's signal
    assert close(found["base"][added], source[added])
    assert not close(found["base"][added], base[added])
    for name in base.keys() - above:
        assert torch.equal(found["base"][name], base[name])
        assert close(found["source"][name], source[name])


@pytest.mark.parametrize("forward", ["base", "source"])
def test_a_patched_step_moves_what_the_severed_one_leaves(task, recipe, forward):
    contrast = task.contrasts()[0]
    patched = sites.activations(recipe.model, "blocks.*.hook_resid_pre")[1:]
    found = outcomes(partial(dy.patch_signals, forward=forward), recipe, None, contrast, patched)
    for layer, site in enumerate(patched, start=1):
        after = found[site.label]
        for name in upstream(recipe.model, layer):
            assert not torch.equal(after[name], found["untouched"][name])
            if not name.endswith("b_K"):
                assert not torch.equal(after[name], found["base"][name])
                assert not torch.equal(after[name], found["source"][name])


def test_a_patched_step_recovers_otherwise_than_the_severed_one_and_than_no_step(task, recipe):
    contrasts = task.contrasts()[:2]
    patched = sites.activations(recipe.model, "blocks.*.hook_resid_pre")
    rows = {
        forward: dy.patch_signals(
            recipe, None, contrasts, patched, dy.measures.correct_logit, forward=forward
        )
        for forward in ("base", "source")
    }
    for i, contrast in enumerate(contrasts):
        severed = [
            measured(hooked_step(recipe, contrast, layer, "forward")[0], contrast)
            for layer in range(N_LAYERS)
        ]
        for result in rows.values():
            values = result["patched"].values[i]
            assert (abs(values - severed) > 1e-6).all()
            assert (abs(values - result["untouched"].values[i]) > 1e-6).all()
    assert (abs(rows["base"]["patched"] - rows["source"]["patched"]) > 1e-6).all()
