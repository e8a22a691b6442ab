"""A head's slices are what the model itself makes its head of, and patching them is the seed's patching."""

import copy
import sys

import pytest
import torch

import dynamics as dy
from dynamics import sites
from tests.oracles.seed_patching import backward, seed_patch
from tests.zoo.hugging_face import BUILDERS, WITH_HEAD, found, hf_loss, model_of, times_covered
from tests.zoo.small_models import ADAMW, draws, tokens, trained

every_model = pytest.mark.parametrize("name", BUILDERS)
every_model_with_a_head = pytest.mark.parametrize("name", WITH_HEAD)

OUTPUTS = ("attn.c_proj", "attention.dense", "self_attn.o_proj")
"""The modules that read the heads' results side by side, [..., n_heads · d_head]."""


def outputs(model):
    return [module for name, module in model.named_modules() if name.endswith(OUTPUTS)]


def watched(model, batch):
    """Per layer Q, K, V as the model's own attention gets them, and the z it hands on: [batch, head, pos, size]."""
    code = sys.modules[type(model).__module__]
    attention, seen = code.eager_attention_forward, []

    def recorded(module, query, key, value, *rest, **named):
        seen.append({"Q": query, "K": key, "V": value})
        return attention(module, query, key, value, *rest, **named)

    def keep(_, inputs, output):
        z = inputs[0].unflatten(-1, (seen[-1]["Q"].shape[1], -1)).transpose(1, 2)
        seen[-1].update(z=z, output=output[:, None])

    handles = [module.register_forward_hook(keep) for module in outputs(model)]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(code, "eager_attention_forward", recorded)
        model(batch.tokens)
    for handle in handles:
        handle.remove()
    return seen


def nudged(model, covers):
    """A copy with everything covered changed."""
    twin = copy.deepcopy(model)
    generator = draws(3)
    with torch.no_grad():
        for name, index in covers.items():
            parameter = twin.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter[index] += noise[index]
    return twin


def changed(before, after):
    """The heads that differ, by layer and quantity."""
    return [
        {
            what: {h for h in range(t.shape[1]) if not torch.equal(t[:, h], new[what][:, h])}
            for what, t in old.items()
        }
        for old, new in zip(before, after, strict=True)
    ]


def group(model, head):
    """The query heads that share keys and values with one."""
    n = model.config.num_attention_heads // getattr(
        model.config, "num_key_value_heads", model.config.num_attention_heads
    )
    return set(range(head // n * n, head // n * n + n))


@pytest.mark.slow
@every_model_with_a_head
def test_a_heads_matrix_moves_what_the_model_makes_of_it_and_nothing_else(name):
    model, batch = model_of(name), tokens(0)
    before = watched(model, batch)
    parts = [s for s in sites.matrices(model) if s.coords["head"] >= 0]
    n_heads, n_shared = model.config.num_attention_heads, len(found(parts, component="W_K", layer=0))
    assert len(parts) == 2 * (2 * n_heads + 2 * n_shared)
    for site in parts:
        part, layer, head = site.coords["component"][-1], site.coords["layer"], site.coords["head"]
        after = changed(before, watched(nudged(model, site.covers), batch))
        assert not any(heads for below in after[:layer] for heads in below.values())
        here = after[layer]
        assert here["output"] == {0}
        assert {p: here[p] for p in "QKV"} == {p: {head} if p == part else set() for p in "QKV"}
        used_by = {"Q": {head}, "O": set()}.get(part, group(model, head * n_heads // n_shared))
        assert here["z"] == used_by, site.label


@every_model_with_a_head
def test_a_heads_output_matrix_reads_its_own_columns_alone(name):
    model = model_of(name)
    generator, n_heads = draws(1), model.config.num_attention_heads
    for site in found(sites.matrices(model), component="W_O"):
        twin = nudged(model, site.covers)
        old, new = (outputs(m)[site.coords["layer"]] for m in (model, twin))
        (weight,) = site.covers
        width = model.get_parameter(weight).numel() // model.config.hidden_size
        z = torch.randn(5, n_heads, width // n_heads, generator=generator, dtype=torch.float64)
        silent = z.clone()
        silent[:, site.coords["head"]] = 0.0
        assert torch.equal(old(silent.flatten(1)), new(silent.flatten(1)))
        assert (old(z.flatten(1)) != new(z.flatten(1))).all()


@every_model_with_a_head
def test_a_head_moves_its_own_result_and_with_shared_keys_and_values_its_groups(name):
    model, batch = model_of(name), tokens(0)
    before = watched(model, batch)
    output = {f"{n}.weight" for n, _ in model.named_modules() if n.endswith(OUTPUTS)}
    for site in sites.heads(model):
        inputs = {n: index for n, index in site.covers.items() if n not in output}
        here = changed(before, watched(nudged(model, inputs), batch))[site.coords["layer"]]
        assert here["z"] == group(model, site.coords["head"])
        assert here["Q"] == {site.coords["head"]}
        only_output = {n: index for n, index in site.covers.items() if n in output}
        here = changed(before, watched(nudged(model, only_output), batch))[site.coords["layer"]]
        assert (here["z"], here["output"]) == (set(), {0})


@every_model
def test_heads_and_circuits_are_made_of_the_matrices_of_their_head(name):
    model = model_of(name)
    single = sites.matrices(model)
    n_heads, n_shared = (len(found(single, component=c, layer=0)) for c in ("W_Q", "W_K"))
    for site in [*sites.heads(model), *sites.circuits(model)]:
        layer, head = site.coords["layer"], site.coords["head"]
        shared = head * n_shared // n_heads
        own = {"Q": head, "K": shared, "V": shared, "O": head}
        letters = {"head": "QKVO", "QK": "QK", "OV": "OV"}[site.coords["component"]]
        parts = [found(single, component=f"W_{p}", layer=layer, head=own[p])[0] for p in letters]
        expected, count = times_covered(model, parts), times_covered(model, [site])
        assert all(torch.equal(expected[n], count[n]) for n in count)
        assert max(int(c.max()) for c in expected.values()) == 1


# --- the verbs --------------------------------------------------------------------------------------------

SINGLE_INSIDE = 1e-6
"""Where a model computes softmax, norms and rotations in single precision, whatever its dtype: a difference of
one ulp of a double before them may become one of a float behind."""

TOLERANCES = {"gpt2": 1e-10, "neox": SINGLE_INSIDE, "llama": SINGLE_INSIDE, "qwen2": SINGLE_INSIDE}


@pytest.mark.slow
@pytest.mark.parametrize("level", ["heads", "components"])
@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])
@pytest.mark.parametrize("name", TOLERANCES)
def test_patching_equals_the_seeds_algorithm(name, verb, level):
    """Unclipped and with an optimizer that works element by element, an exchanged update is the update of an
    exchanged gradient."""
    recipe = dy.Recipe(
        model_of(name), hf_loss, ADAMW, max_grad_norm=0.1 if verb is dy.patch_gradients else None
    )
    live = trained(recipe, [tokens(0), tokens(1)])
    pair = dy.Contrast(tokens(10), tokens(11), tokens(12))
    patched = sites.LEVELS[level](recipe.model)
    measures = {"correct_logit": dy.measures.correct_logit}
    result = verb(recipe, live.last, [pair], patched, measures)
    gradients = tuple(backward(recipe, live.model, batch) for batch in (pair.base, pair.source))
    for site in patched:
        expected = seed_patch(recipe, live, pair, site, measures, gradients=gradients)["correct_logit"]
        cell = result.sel(site=site.label).isel(example=0, measure=0)
        assert abs(cell["patched"].item() - expected) < TOLERANCES[name] * max(1.0, abs(expected))
        assert abs(cell["effect"].item()) > 1e-5
