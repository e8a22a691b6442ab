"""Linear CKA, divergences of attention and roles of heads, against their definitions in numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from dynamics import sites
from dynamics.comparison import compare_activations, compare_patterns, head_roles, linear_cka
from tests.zoo.comparison_models import living, questions

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def hsic_cka(x, y):
    """HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with centring matrices written out."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    k, m = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


def cached(recipe, state, batch, hook):
    """An activation as TransformerLens caches it."""
    _, cache = living(recipe, state).run_with_cache(batch.tokens)
    return cache[hook].detach().numpy()


@pytest.mark.parametrize("n", [4, 30])
def test_cka_is_its_definition_by_either_way_to_compute_it(n):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(n, 5)), generator.normal(size=(n, 7)) + 3
    np.testing.assert_allclose(linear_cka(torch.tensor(x), torch.tensor(y)), hsic_cka(x, y), **EXACT)


def test_cka_does_not_see_rotation_scale_and_shift_and_sees_other_maps():
    generator = np.random.default_rng(1)
    x = torch.tensor(generator.normal(size=(20, 4)))
    rotation = torch.linalg.qr(torch.tensor(generator.normal(size=(4, 4))))[0]
    np.testing.assert_allclose(linear_cka(x, 3 * x @ rotation + 1), 1, rtol=1e-12)
    assert linear_cka(x, x * torch.tensor([1.0, 5.0, 0.1, 1.0])) < 0.95
    assert np.isnan(linear_cka(x, torch.ones(20, 2)))


@pytest.mark.slow
def test_activations_are_compared_position_by_position(recipe, pair):
    batch = questions(3)
    chosen = sites.activations(recipe.model, "blocks.*.hook_resid_post", ("layer", "pos"), batch)
    found = compare_activations(*pair, recipe, batch, chosen)
    assert found.sizes["site"] == 8
    for i, site in enumerate(chosen):
        hook = f"blocks.{site.coords['layer']}.hook_resid_post"
        x, y = (cached(recipe, state, batch, hook)[:, site.coords["pos"]] for state in pair)
        np.testing.assert_allclose(found["cka"][i], hsic_cka(x, y), **EXACT)
    (whole,) = sites.activations(recipe.model, "blocks.1.hook_resid_post")
    x, y = (cached(recipe, state, batch, "blocks.1.hook_resid_post").reshape(-1, 6) for state in pair)
    np.testing.assert_allclose(
        compare_activations(*pair, recipe, batch, [whole])["cka"], [hsic_cka(x, y)], **EXACT
    )


def test_patterns_diverge_as_scipy_has_it(recipe, pair):
    batch = questions(3)
    chosen = sites.activations(recipe.model, "*hook_pattern", ("layer", "head"), batch)
    found = compare_patterns(*pair, recipe, batch, chosen)
    for i, site in enumerate(chosen):
        layer, head = site.coords["layer"], site.coords["head"]
        p, q = (cached(recipe, s, batch, f"blocks.{layer}.attn.hook_pattern")[:, head] for s in pair)
        divergence = np.mean([[jensenshannon(p[b, i], q[b, i]) ** 2 for i in range(1, 4)] for b in range(7)])
        np.testing.assert_allclose(
            found["divergence"][i], divergence * 3 / 4, **EXACT
        )  # query 0 sees itself alone
        np.testing.assert_allclose(found["moved"][i], np.abs(p - q).sum(-1).mean() / 2, **EXACT)
    same = compare_patterns(pair[0], pair[0], recipe, batch, chosen)
    np.testing.assert_allclose(same["divergence"], 0, atol=1e-15)


def test_roles_are_read_off_the_pattern_row_by_row(recipe, pair):
    one, other = questions(3), questions(8, rows=4)
    chosen = sites.activations(recipe.model, "*hook_pattern", ("layer", "head"), one)
    places = {"previous": (one, one.target_pos - 1), "first": (other, torch.zeros(4, dtype=torch.int64))}
    found = head_roles(recipe, pair[0], places, chosen)["attention"]
    for name, (batch, positions) in places.items():
        for i, site in enumerate(chosen):
            layer, head = site.coords["layer"], site.coords["head"]
            pattern = cached(recipe, pair[0], batch, f"blocks.{layer}.attn.hook_pattern")[:, head]
            looks = [pattern[r, batch.target_pos[r], positions[r]] for r in range(len(batch))]
            np.testing.assert_allclose(found.sel(measure=name)[i], np.mean(looks), **EXACT)


def test_what_is_no_pattern_and_what_covers_too_much_is_refused(recipe, pair):
    batch = questions(3)
    resid = sites.activations(recipe.model, "blocks.*.hook_resid_post")
    with pytest.raises(sites.SiteError, match="is no attention pattern"):
        compare_patterns(*pair, recipe, batch, resid)
    whole = sites.activations(recipe.model, "*hook_pattern")
    with pytest.raises(sites.SiteError, match="one head's"):
        head_roles(recipe, pair[0], {"first": (batch, batch.target_pos * 0)}, whole)
    both = sites.activations(recipe.model, "blocks.*.hook_resid_post", by=())
    with pytest.raises(sites.SiteError, match="covers several outputs"):
        compare_activations(*pair, recipe, batch, both)
    with pytest.raises(ValueError, match="no roles"):
        head_roles(recipe, pair[0], {}, whole)


def test_hooks_and_modes_are_as_they_were(recipe, pair):
    batch = questions(3)
    recipe.model.train()
    compare_activations(*pair, recipe, batch, sites.activations(recipe.model, "blocks.*.hook_resid_post"))
    assert recipe.model.training
    assert not any(module._forward_hooks for module in recipe.model.modules())
