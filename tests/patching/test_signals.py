"""patch_signals beside three slow constructions: a linear term in the loss, a model cut in two, tensor hooks."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site
from dynamics.trees import mask
from tests.oracles.seed_patching import backward, seed_patch
from tests.zoo.cases import first_quick
from tests.zoo.signal_models import (
    ALL,
    RECIPES,
    TOYS,
    begun,
    contrast_of,
    filled,
    hooked,
    off,
    read_by_hand,
    revealed,
    tolerance_of,
)
from tests.zoo.small_models import ADAMW, CLIPS, OPTIMIZERS, margin

HEAD_AXIS = {"hook_q": 2, "hook_k": 2, "hook_v": 2, "hook_z": 2, "hook_attn_scores": 1, "hook_pattern": 1}


class Workbench:
    """A recipe some steps into training, and both runs of a contrast read by hand."""

    def __init__(self, name, **changes):
        recipe = RECIPES[name]()
        self.name, self.recipe, self.pair = name, dataclasses.replace(recipe, **changes), contrast_of(name)
        self.live = begun(self.recipe, name)
        self.twin = copy.deepcopy(self.live.model)
        self.names = sites.hooks(self.recipe.model)
        _, self.ours = read_by_hand(self.recipe, self.live, self.pair.base, self.names)
        self.values, self.theirs = read_by_hand(self.recipe, self.live, self.pair.source, self.names)
        self.ran = [n for n in self.names if self.ours[n]]

    def copy(self):
        self.twin.zero_grad()
        return self.twin

    def linear_term(self, site):
        """Gradient of the base loss + <λ_R − λ_U, a> over the slice, the difference frozen."""
        model, kept = self.copy(), {name: [] for name in site.covers}

        def keeper(name):
            def keep(activation):
                kept[name].append(activation)
                return activation.clone()

            return keep

        with self.live.last.random_state(), hooked(model, {n: keeper(n) for n in kept}):
            loss = self.recipe.loss(model, self.pair.base)
        for name, index in site.covers.items():
            for a, ours, theirs in zip(kept[name], self.ours[name], self.theirs[name], strict=True):
                loss = loss + ((theirs - ours)[index] * a[index]).sum()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    def cut(self, site, forward="base"):
        """The part below the activation a and the part above it differentiated apart, joined by λ'."""
        ((name, index),) = site.covers.items()
        model, runs = self.copy(), []
        wanted = [p for p in model.parameters() if p.requires_grad]

        def sever(activation):
            covered = mask(index, activation.shape, activation.device)
            given = self.values[name][0] if forward == "source" else activation
            leaf = torch.where(covered, given, activation).detach().requires_grad_()
            runs.append((activation, leaf, covered))
            return leaf.clone()

        with self.live.last.random_state(), hooked(model, {name: sever}):
            loss = self.recipe.loss(model, self.pair.base)
        ((activation, leaf, covered),) = runs
        *around, arriving = torch.autograd.grad(loss, [*wanted, leaf], allow_unused=True, retain_graph=True)
        arriving = torch.zeros_like(leaf) if arriving is None else arriving
        through = [None] * len(wanted)
        if activation.requires_grad:
            signal = torch.where(covered, self.theirs[name][0], arriving)
            through = torch.autograd.grad(activation, wanted, signal, allow_unused=True)
        summed = [u if v is None else v if u is None else u + v for u, v in zip(around, through, strict=True)]
        by_id = dict(zip(map(id, wanted), summed, strict=True))
        return {n: by_id.get(id(p)) for n, p in model.named_parameters()}

    def tensor_hooks(self, site):
        """λ_R written over what arrives, by a hook on the tensor itself at each run of each module."""
        model, runs = self.copy(), dict.fromkeys(site.covers, 0)

        def replacer(name):
            def replace(activation):
                theirs = self.theirs[name][runs[name]]
                runs[name] += 1
                covered = mask(site.covers[name], activation.shape, activation.device)
                passed = activation.clone()
                if passed.requires_grad:
                    passed.register_hook(lambda g: torch.where(covered, theirs, g))
                return passed

            return replace

        with self.live.last.random_state(), hooked(model, {n: replacer(n) for n in site.covers}):
            self.recipe.loss(model, self.pair.base).backward()
        return {name: p.grad for name, p in model.named_parameters()}


def pieces(name, shape):
    """An activation whole, and parts of it: a position, a head, a head at a position, whatever a mask picks."""
    part = name.rpartition(".")[2]
    heads = HEAD_AXIS.get(part)
    pos = 2 if heads == 1 else 1
    generator = torch.Generator().manual_seed(len(name))
    found = {"whole": ..., "mask": torch.rand(shape, generator=generator) < 0.5}
    if len(shape) > 2:
        found["position"] = (*(ALL,) * pos, 1)
        found["positions"] = (*(ALL,) * pos, torch.tensor([0, 2]))
    if heads:
        found["head"] = (*(ALL,) * heads, 1)
        first, second = sorted((heads, pos))
        found["head at position"] = tuple(1 if axis in (first, second) else ALL for axis in range(second + 1))
    return [Site(f"{name} {kind}", {name: index}) for kind, index in found.items()]


def one_of_each(bench):
    """A piece of every activation that ran, of one kind after the other; one block of a transformer will do."""
    ran = [n for n in bench.ran if ".0." not in n or bench.name == "LN gelu"]
    parts = [pieces(name, bench.ours[name][0].shape) for name in ran]
    return [some[i % len(some)] for i, some in enumerate(parts)]


def assert_agrees(bench, patched, oracles, forward="base"):
    """Every site's gradient, element by element; and most sites must have moved it."""
    found = revealed(
        lambda *args: dy.patch_signals(*args, forward=forward),
        bench.recipe,
        bench.live.last,
        bench.pair,
        patched,
    )
    moved = 0
    for site in patched:
        for oracle in oracles:
            expected = filled(bench.recipe.model, oracle(site))
            assert off(found[site.label], expected) < tolerance_of(bench.name), (site.label, oracle)
        moved += off(found[site.label], found["base"]) > 1e-4
    assert moved > len(patched) / 2


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("odd", "convolutions")])
def test_at_every_module_all_three_constructions_give_the_patched_gradient(name):
    bench = Workbench(name)
    assert_agrees(bench, one_of_each(bench), [bench.linear_term, bench.cut, bench.tensor_hooks])


@pytest.mark.slow
def test_at_every_hook_of_a_block_every_head_position_and_mask_gives_the_patched_gradient():
    bench = Workbench("LN gelu")
    names = [n for n in bench.ran if n.startswith("blocks.1.") and "hook_" in n]
    patched = [piece for n in names for piece in pieces(n, bench.ours[n][0].shape)]
    assert_agrees(bench, patched, [bench.tensor_hooks])


@pytest.mark.parametrize("name", ["odd", "convolutions"])
def test_where_a_module_runs_twice_every_run_gets_the_signal_of_the_same_run(name):
    bench = Workbench(name)
    repeated = {n for n in bench.ran if len(bench.ours[n]) > 1}
    assert repeated == {{"odd": "twice", "convolutions": "relu"}[name]}
    for n in bench.ran:
        patched = pieces(n, bench.ours[n][0].shape)[:1]
        oracles = (
            [bench.tensor_hooks] if n in repeated else [bench.tensor_hooks, bench.linear_term, bench.cut]
        )
        found = revealed(dy.patch_signals, bench.recipe, bench.live.last, bench.pair, patched)
        for oracle in oracles:
            expected = filled(bench.recipe.model, oracle(patched[0]))
            assert off(found[patched[0].label], expected) < 1e-12, n


@pytest.mark.parametrize("name", first_quick([*TOYS, "GPT-2", "GPT-NeoX", "Llama"]))
def test_sites_on_one_path_are_replaced_one_after_the_other_and_not_added(name):
    """Where a linear term for each would be wrong by the first site's whole effect on the second."""
    bench = Workbench(name)
    on_a_path = [
        Site(f"{one} and {other}", {one: ..., other: ...}) for one, other in pairwise(bench.ran[::5])
    ]
    assert_agrees(bench, on_a_path, [bench.tensor_hooks])
    wrong = [filled(bench.recipe.model, bench.linear_term(site)) for site in on_a_path]
    right = [filled(bench.recipe.model, bench.tensor_hooks(site)) for site in on_a_path]
    assert max(off(w, r) for w, r in zip(wrong, right, strict=True)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("odd", "convolutions")])
def test_with_the_sources_activation_forward_the_cut_model_gives_the_patched_gradient(name):
    bench = Workbench(name)
    assert_agrees(bench, one_of_each(bench), [lambda site: bench.cut(site, "source")], "source")


def test_halves_of_a_network_written_out_give_the_patched_gradient():
    """No hook at all: λ' through the lower half by the chain rule, the path around, the upper half as it was."""
    recipe, pair = RECIPES["MLP"](), contrast_of("MLP")
    model = recipe.model

    def lower(batch):
        return model.activation(model.lower(batch[0]))

    def upper(hidden, inner, batch):
        return nn.functional.cross_entropy(model.upper(hidden + model.activation(inner)), batch[1])

    def signal(batch):
        hidden = lower(batch)
        inner = model.inner(hidden)
        return torch.autograd.grad(upper(hidden, inner, batch), inner)[0]

    half = (ALL, slice(0, 4))
    patched = signal(pair.base)
    patched[half] = signal(pair.source)[half]
    hidden = lower(pair.base)
    beside = hidden.detach().requires_grad_()
    inner = model.inner(beside)
    above = dict(model.upper.named_parameters(prefix="upper"))
    *upper_gradients, around = torch.autograd.grad(
        upper(beside, inner.detach(), pair.base), [*above.values(), beside]
    )
    within = dict(model.inner.named_parameters(prefix="inner"))
    *inner_gradients, through = torch.autograd.grad(inner, [*within.values(), beside], patched)
    below = dict(model.lower.named_parameters(prefix="lower"))
    lower_gradients = torch.autograd.grad(hidden, [*below.values()], around + through)
    expected = dict(
        zip([*above, *within, *below], [*upper_gradients, *inner_gradients, *lower_gradients], strict=True)
    )
    found = revealed(dy.patch_signals, recipe, None, pair, [Site("half", {"inner": half})])
    assert off(found["half"], expected) < 1e-14
    assert off(found["half"], found["base"]) > 1e-2


# --- the step and what is measured after it ---------------------------------------------------------------


def assert_measures_agree(bench, start, patched, measures):
    recipe, live = bench.recipe, bench.live
    checkpoint = live.last.with_fresh_optimizer() if start == "fresh" else live.last
    result = dy.patch_signals(recipe, checkpoint, [bench.pair], patched, measures)
    base = backward(recipe, live.model, bench.pair.base)
    whole = Site("every parameter", dict.fromkeys(base, ...))
    for site in patched:
        gradients = base, bench.linear_term(site)
        expected = seed_patch(recipe, live, bench.pair, whole, measures, start == "fresh", gradients)
        for measure, value in expected.items():
            found = result["patched"].sel(site=site.label, measure=measure).item()
            assert abs(found - value) < 1e-10 * max(1.0, abs(value)), (site.label, measure)
    assert float(abs(result["effect"]).max()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clip", "optimizer", "start"),
    [
        ("unclipped", "AdamW", "fresh"),
        ("unclipped", "SGD momentum", "warm"),
        ("by norm", "AdamW", "warm"),
        ("by norm", "SGD momentum", "fresh"),
        ("by value", "AdamW", "fresh"),
        ("by value", "SGD momentum", "warm"),
    ],
)
def test_the_step_is_that_of_torchs_clipping_and_optimizer_on_the_patched_gradient(clip, optimizer, start):
    bench = Workbench("LN gelu", optimizer=OPTIMIZERS[optimizer], clip=CLIPS[clip])
    measures = {m.name: m for m in (dy.measures.correct_logit, dy.measures.logit_difference)}
    assert_measures_agree(bench, start, one_of_each(bench)[::9], measures)


@pytest.mark.parametrize("name", first_quick(["MLP", "LSTM", "tied", "Llama"], 2))
def test_the_step_of_other_models_is_that_of_their_own_optimizer_too(name):
    bench = Workbench(name, optimizer=ADAMW, clip=CLIPS["by norm"])
    measure = margin if name == "MLP" else dy.measures.correct_logit
    assert_measures_agree(bench, "warm", one_of_each(bench)[::2], {"measured": measure})
