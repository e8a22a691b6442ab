"""attribute_activations beside TransformerLens's node attribution, autograd by hand, and real patching."""

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from transformer_lens.tools.analysis.attribution_patching import attribution_patch

import dynamics as dy
from dynamics import measures, sites
from dynamics.engine import forward_passes
from dynamics.measures import LogitMeasure
from dynamics.sites import Site
from dynamics.steps import NonFiniteGradient
from tests.oracles.forward_hooks import outputs_of, patched_by_hand
from tests.patching.test_activations import ALL, LOGITS, everywhere, head_logit, measure_of, pairs
from tests.zoo.signal_models import COARSE, RECIPES, TOYS, Odd, batch_of, made
from tests.zoo.small_models import ADAMW, tokens, trained, transformer

INTEGRATED = partial(dy.attribute_activations, method="integrated", tolerance=0.0, max_nodes=32)


@pytest.fixture(scope="module")
def toy():
    """A toy that has trained a little."""
    recipe = dy.Recipe(transformer(), measures.cross_entropy, ADAMW)
    return trained(recipe, [tokens(seed) for seed in range(20)]).model


def attributed(model, contrasts, chosen, measure=measures.correct_logit, **settings):
    return dy.attribute_activations(dy.Recipe(model), None, contrasts, chosen, measure, **settings)


def gradients_by_hand(model, batch, measure, names):
    """d mean measure / d output of each submodule, and the output, by run: hooks and retain_grad on a copy."""
    twin, kept = copy.deepcopy(model).eval().requires_grad_(True), {n: [] for n in names}

    def keep(name, output):
        given = output if isinstance(output, torch.Tensor) else output[0]
        used = (
            given.clone() if given.requires_grad else given.clone().requires_grad_()
        )  # no other path reads it
        used.retain_grad()
        kept[name].append(used)
        passed = used.clone()
        return passed if isinstance(output, torch.Tensor) else (passed, *output[1:])

    for name in names:
        twin.get_submodule(name).register_forward_hook(lambda m, i, output, name=name: keep(name, output))
    measure(twin, batch).mean().backward()
    return {
        n: [(u.detach(), torch.zeros_like(u) if u.grad is None else u.grad) for u in runs]
        for n, runs in kept.items()
    }


# --- TransformerLens's node attribution -------------------------------------------------------------------


def test_it_is_transformer_lenss_node_attribution(toy):
    contrasts = [dataclasses.replace(p, base=one(p.base), source=one(p.source)) for p in pairs(4, rows=1)]
    chosen = [
        *everywhere(toy, "hook_embed", "pos"),
        *everywhere(toy, "blocks.*.attn.hook_z", "layer", "pos", "head"),
        *everywhere(toy, "blocks.*.hook_mlp_out", "layer", "pos"),
    ]
    found = attributed(toy, contrasts, chosen)["attribution"].mean("example")
    clean, corrupt = (torch.cat([getattr(c, side).tokens for c in contrasts]) for side in ("source", "base"))
    nodes = attribution_patch(copy.deepcopy(toy).eval(), clean, corrupt, lambda z: z[0, 3, 5]).node_scores
    assert len(nodes) == found.sizes["site"] == 4 + 2 * 4 * 2 + 2 * 4
    assert max(map(abs, nodes.values())) > 1e-2
    for node, score in nodes.items():
        kind = {"embed": "embed", "attn_head_out": "attn.z", "mlp_out": "mlp_out"}[node.kind]
        where = (found["component"] == kind) & (found["pos"] == node.position)
        where &= found["layer"] == (-1 if node.layer is None else node.layer)
        where &= found["head"] == (-1 if node.head is None else node.head)
        assert found.values[where.values].item() == pytest.approx(score, abs=1e-5), node


def one(batch):
    """The row scored at position 3 for token 5, as every pair of TransformerLens's is."""
    return dataclasses.replace(
        batch, target_pos=torch.full_like(batch.target_pos, 3), targets=torch.full_like(batch.targets, 5)
    )


# --- gradients by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_first_order_is_the_gradient_times_the_difference_on_any_module(name):
    recipe, measure = RECIPES[name](), measure_of(name)
    pair = dy.Contrast(batch_of(name, 10), batch_of(name, 11))
    hooks = [n for n in sites.hooks(recipe.model) if "." in n or name not in COARSE]
    ran = outputs_of(recipe.model, pair.source, measure, hooks)
    kept = [n for n in hooks if n in ran]
    expected = gradients_by_hand(recipe.model, pair.base, measure, kept)
    chosen = [Site(n, {n: ...}) for n in kept] + [
        Site(f"{n} cut", {n: (ALL, 0)}) for n in kept if ran[n][0].ndim > 1
    ]
    found = attributed(recipe.model, [pair], chosen, measure)["attribution"]
    for site in chosen:
        ((hook, index),) = site.covers.items()
        by_hand = 0.0
        for (value, gradient), source in zip(expected[hook], ran[hook], strict=True):
            product = torch.nan_to_num(gradient) * torch.nan_to_num(source - value)  # −inf less −inf
            by_hand += float(product[index].sum())
        tolerance = 1e-6 if name in COARSE else 1e-12
        assert found.sel(site=site.label).item() == pytest.approx(by_hand, abs=tolerance), site.label
    assert abs(found).max() > 1e-3


def test_attention_attribution_is_the_gradient_times_the_pattern(toy):
    """create_attention_attr of the attribution patching demo: per prompt, head, destination and source."""
    contrasts = pairs(3, rows=1)
    chosen = everywhere(toy, "blocks.*.attn.hook_pattern", "layer", "head", "pos", "src")
    assert len(chosen) == 2 * 2 * 4 * 4
    found = -attributed(toy, contrasts, chosen, values="zero")["attribution"]
    for i, contrast in enumerate(contrasts):
        hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
        kept = gradients_by_hand(toy, contrast.base, measures.correct_logit, hooks)
        expected = np.stack([(kept[h][0][0] * kept[h][0][1])[0].numpy() for h in hooks])
        np.testing.assert_allclose(found[i].values.reshape(2, 2, 4, 4), expected, rtol=0, atol=1e-12)
    assert [found[n].values[0] for n in ("pos", "src")] == [0, 0]
    assert chosen[-1].label == "attn.pattern L1H1 @3<-3"


@pytest.mark.slow
def test_contrasts_run_together_and_several_measures_are_those_alone(toy, monkeypatch):
    chosen = everywhere(toy, "blocks.*.attn.hook_q", "layer", "head", "pos")
    several = {**LOGITS, "head": head_logit}
    for settings in ({}, {"method": "integrated", "tolerance": 0.0, "max_nodes": 8}):
        together = attributed(toy, pairs(), chosen, several, **settings)
        for i, pair in enumerate(pairs()):
            for name, measure in several.items():
                alone = attributed(toy, [pair], chosen, measure, **settings).isel(example=0)
                cell = together.sel(measure=name).isel(example=i)
                for variable in alone.data_vars:
                    np.testing.assert_allclose(cell[variable], alone[variable], rtol=0, atol=1e-12)
    monkeypatch.setattr(forward_passes, "ROWS", 2)
    np.testing.assert_allclose(
        attributed(toy, pairs(), chosen, several)["attribution"],
        attributed(toy, pairs(), chosen, several)["attribution"],
        rtol=0,
        atol=1e-12,
    )


def test_sites_of_several_hooks_overlapping_sites_and_masks_add_up(toy):
    pair = pairs(1)[0]
    heads = everywhere(toy, "blocks.*.attn.hook_z", "layer", "head")
    both = everywhere(toy, "blocks.*.attn.hook_z", "head")
    mask = torch.zeros(2, 4, 2, 4, dtype=torch.bool)
    mask[1, 2] = True
    masked = [Site("row 1, position 2", {"blocks.0.attn.hook_z": mask})]
    found = attributed(toy, [pair], [*heads, *both, *masked])["attribution"][0]
    for head in range(2):
        parts = [float(found.sel(site=f"attn.z L{layer}H{head}")) for layer in range(2)]
        assert float(found.sel(site=f"attn.z H{head}")) == pytest.approx(sum(parts), abs=1e-12)
    row = dataclasses.replace(pair, base=pair.base[1:2], source=pair.source[1:2])
    alone = attributed(toy, [row], everywhere(toy, "blocks.0.attn.hook_z", "pos"))["attribution"][0]
    assert float(found[-1]) == pytest.approx(float(alone[2]) / 2, abs=1e-12)  # one of two rows


# --- the integral -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_integrated_attributions_of_a_hook_sum_to_the_effect_of_exchanging_it_whole(name):
    model = transformer(**TOYS[name])
    patterns = [
        "hook_embed",
        "blocks.*.attn.hook_pattern",
        "blocks.*.attn.hook_k",
        "*attn_scores",
        "*resid_post",
    ]
    for pattern in patterns:
        cut = everywhere(model, pattern, "layer", "pos")
        found = INTEGRATED(dy.Recipe(model), None, pairs(), cut, measures.correct_log_prob)
        whole = dy.patch_activations(
            dy.Recipe(model), None, pairs(), everywhere(model, pattern, "layer"), measures.correct_log_prob
        )
        missed = found["attribution"].groupby("layer").sum() - whole["effect"].values
        tolerance = 0.05 if "relu" in name else 1e-7  # kinks
        assert abs(missed).max() < tolerance, pattern
        largest = np.abs(missed.values).argmax(-1)
        picked = np.take_along_axis(missed.values, largest[:, None], -1)[:, 0]
        np.testing.assert_allclose(found["residual"], picked, rtol=0, atol=1e-10)
        assert (found["nodes"] == 32).all()
        if pattern == "*resid_post":
            assert (
                abs(found["source"] - found["base"] - found["attribution"].groupby("layer").sum()).max()
                < tolerance
            )


@pytest.mark.slow
def test_reversing_a_contrast_negates_integrated_attributions_at_the_embedding_and_not_first_order_ones(toy):
    chosen = everywhere(toy, "hook_embed", "pos")
    there = INTEGRATED(dy.Recipe(toy), None, pairs(), chosen, LOGITS)["attribution"]
    back = INTEGRATED(dy.Recipe(toy), None, [p.reversed() for p in pairs()], chosen, LOGITS)["attribution"]
    assert abs(there + back).max() < 1e-12
    first = [attributed(toy, c, chosen)["attribution"] for c in (pairs(), [p.reversed() for p in pairs()])]
    assert abs(first[0] + first[1]).max() > 1e-3


def test_one_node_at_the_middle_is_the_gradient_there():
    """Gauss-Legendre's rule of one node, by hand."""
    model, pair = transformer(), pairs(1)[0]
    name = "blocks.0.hook_resid_mid"
    found = dy.attribute_activations(
        dy.Recipe(model), None, [pair], [Site("mid", {name: ...})], head_logit, "integrated", 0.0, 1
    )
    base, source = (outputs_of(model, b, head_logit, [name])[name][0] for b in (pair.base, pair.source))
    twin = copy.deepcopy(model).eval()
    leaf = ((base + source) / 2).requires_grad_()
    twin.get_submodule(name).register_forward_hook(lambda *_: leaf)
    (gradient,) = torch.autograd.grad(head_logit(twin, pair.base).mean(), leaf)
    expected = float((gradient * (source - base)).sum())
    assert found["attribution"].item() == pytest.approx(expected, abs=1e-12)
    effect = (
        patched_by_hand(model, pair.base, head_logit, {name: ...}, {name: [source]}) - found["base"].item()
    )
    assert found["residual"].item() == pytest.approx(expected - effect, abs=1e-12)
    assert found["nodes"].item() == 1


def test_nodes_double_until_the_residual_is_small_and_a_layer_that_runs_twice_counts_both(toy):
    model = made(Odd)
    pair = dy.Contrast(tokens(0), tokens(1))
    chosen = [Site("twice", {"twice": ...}), Site("head", {"head": ...})]
    coarse, fine = (
        dy.attribute_activations(dy.Recipe(model), None, [pair], chosen, head_logit, "integrated", tolerance)
        for tolerance in (0.5, 0.0)
    )
    assert (coarse["nodes"].item(), fine["nodes"].item()) == (8, 64)
    whole = dy.patch_activations(dy.Recipe(model), None, [pair], chosen, head_logit)
    np.testing.assert_allclose(fine["attribution"], whole["effect"], rtol=0, atol=1e-9)


# --- beside real patching ---------------------------------------------------------------------------------


def test_it_becomes_the_patched_effect_as_the_prompts_become_alike():
    model, pair = transformer(), pairs(1)[0]
    with torch.no_grad():  # all tokens embed nearly alike
        model.embed.W_E[:] = model.embed.W_E[:1] + 1e-6 * model.embed.W_E
    chosen = everywhere(model, "blocks.*.attn.hook_[qkvz]", "layer", "head", "pos")
    estimated = attributed(model, [pair], chosen)["attribution"]
    real = dy.patch_activations(dy.Recipe(model), None, [pair], chosen, measures.correct_logit)["effect"]
    large = abs(real.values) > 1e-9
    assert large.sum() > 20
    np.testing.assert_allclose(estimated.values[large], real.values[large], rtol=1e-2)


@pytest.mark.slow
def test_ranks_agree_with_real_patching(toy):
    chosen = everywhere(toy, "blocks.*.attn.hook_[qkvz]", "layer", "head", "pos")
    real = dy.patch_activations(dy.Recipe(toy), None, pairs(6), chosen, measures.correct_logit)["effect"]
    rank = {
        method: scipy.stats.spearmanr(
            attributed(toy, pairs(6), chosen, method=method)["attribution"].values.ravel(),
            real.values.ravel(),
        ).statistic
        for method in ("first_order", "integrated")
    }
    assert min(rank.values()) > 0.95


# --- errors -----------------------------------------------------------------------------------------------


def test_a_measure_without_a_gradient_is_refused(toy):
    with pytest.raises(ValueError, match="no gradient with respect to any of the activations"):
        attributed(toy, pairs(), everywhere(toy, "blocks.*.hook_mlp_out"), measures.accuracy)


def test_an_infinite_gradient_is_named(toy):
    broken = LogitMeasure("root", "", lambda z, b: (z[:, 0] - z[:, 0].detach()).sqrt())
    with pytest.raises(NonFiniteGradient, match=r"pair 0 and 2 more at blocks.0.hook_mlp_out"):
        attributed(toy, pairs(), everywhere(toy, "blocks.*.hook_mlp_out"), broken)


def test_an_unknown_method_is_refused(toy):
    with pytest.raises(ValueError, match="method is 'second_order'"):
        attributed(toy, pairs(), everywhere(toy, "hook_embed"), method="second_order")


def test_first_order_has_no_residual_and_one_node(toy):
    found = attributed(toy, pairs(), everywhere(toy, "hook_embed"))
    assert "residual" not in found
    assert (found["nodes"] == 1).all()
    assert dy.statistics.summarize(found)["effect"].dims == ("site",)
