"""Placebos: random places with a site's own ‖Δ‖, and what a summary says of them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

import dynamics as dy
from dynamics import results, sites, statistics, steps
from dynamics.sites import Site, SiteError

ALL = slice(None)
SHAPES = {"first.weight": (7, 5), "first.bias": (7,), "second.weight": (3, 7), "scale": ()}


def differences(seed: int = 0) -> dict[str, Tensor]:
    """Δ of every size, from 1e-3 to 1e3, so that the last element taken can matter a lot or not at all."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 10 ** (6 * torch.rand(shape, generator=generator, dtype=torch.float64) - 3)
        for name, shape in SHAPES.items()
    }


def ones() -> dict[str, Tensor]:
    return {name: torch.ones(shape) for name, shape in SHAPES.items()}


N = sum(int(np.prod(shape)) for shape in SHAPES.values())

SITES = {
    "a row": ({"first.weight": (2,)}, 5),
    "columns": ({"first.weight": (ALL, slice(1, 3))}, 14),
    "an element counted from the end": ({"second.weight": (-1, -2)}, 1),
    "units named one by one": ({"second.weight": (ALL, torch.tensor([0, 3, 4]))}, 9),
    "a mask": ({"first.weight": torch.eye(7, 5, dtype=torch.bool)}, 5),
    "a whole tensor": ({"first.bias": ...}, 7),
    "two tensors and a number": ({"first.bias": (slice(0, 3),), "second.weight": (0,), "scale": ...}, 11),
}


def site(name: str) -> Site:
    return Site(name, SITES[name][0])


def squares(delta: dict[str, Tensor], covers: Any) -> np.ndarray:
    """Δ² of what is covered, element by element, in fp64."""
    return np.concatenate(
        [np.atleast_1d(delta[n][i].double().numpy()).ravel() ** 2 for n, i in covers.items()]
    )


def elements(found: Site) -> np.ndarray:
    """What a placebo covers, as one boolean vector over all parameters."""
    return np.concatenate([found.covers[name].numpy().ravel() for name in SHAPES])


# --- the size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SITES)
def test_a_placebo_holds_the_sites_sum_of_squares_to_within_one_element(name):
    n_found = 0
    for seed in range(20):
        delta = differences(seed)
        wanted = squares(delta, site(name).covers).sum()
        for placebo in sites.placebo(site(name), delta, n=10):
            taken = squares(delta, placebo.covers)
            assert taken.sum() >= wanted * (1 - 1e-12)
            assert taken.sum() - taken.max() < wanted
            n_found += 1
    assert n_found >= 20


@pytest.mark.parametrize("name", SITES)
def test_where_all_elements_differ_alike_a_placebo_has_as_many_as_the_site(name):
    for placebo in sites.placebo(site(name), ones(), n=10):
        assert elements(placebo).sum() == SITES[name][1]


def test_elements_that_do_not_differ_add_nothing_to_a_placebos_size():
    delta = ones()
    delta["first.weight"].zero_()  # 35 of 64 elements: they may be taken, and count for nothing
    counts = [
        (squares(delta, p.covers).sum(), elements(p).sum())
        for p in sites.placebo(site("a whole tensor"), delta)
    ]
    assert {size for size, _ in counts} == {7.0}
    assert max(n for _, n in counts) > 7


def test_the_sign_of_a_difference_does_not_matter():
    delta = differences()
    signed = {name: d * (-1) ** torch.arange(d.numel()).reshape(d.shape) for name, d in delta.items()}
    for one, other in zip(
        sites.placebo(site("a row"), delta), sites.placebo(site("a row"), signed), strict=True
    ):
        assert (elements(one) == elements(other)).all()


def test_sums_are_taken_in_double_precision():
    """In fp32 16,777,216 + 1 is 16,777,216: after one large element the small ones would not count."""
    delta = {"large": torch.full((3,), 4096.0), "small": torch.ones(2000)}
    one = Site("one", {"large": (0,), "small": (slice(0, 1000),)})
    wanted = 4096**2 + 1000
    found = [squares(delta, p.covers) for p in sites.placebo(one, delta)]
    assert all(taken.sum() - taken.max() < wanted <= taken.sum() for taken in found)
    assert wanted in [taken.sum() for taken in found]


# --- randomness -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_element_of_every_tensor_is_as_likely_as_any_other_the_sites_own_included():
    n = 3000
    found = np.mean([elements(p) for p in sites.placebo(site("columns"), ones(), n=n)], axis=0)
    expected = 14 / N
    error = np.sqrt(expected * (1 - expected) / n)
    assert np.abs(found - expected).max() < 4.5 * error
    assert np.abs(found - expected).max() > 0.5 * error  # and it is not a design


def test_a_placebo_is_disjoint_from_nothing_in_particular():
    own = np.zeros(N, dtype=bool)
    own[:35] = np.zeros((7, 5), dtype=bool).ravel()
    own.reshape(-1)[:35].reshape(7, 5)[:, 1:3] = True
    shared = [int((elements(p) & own).sum()) for p in sites.placebo(site("columns"), ones(), n=200)]
    assert own.sum() == 14
    assert 0 < np.mean(shared) < 14
    assert len(set(shared)) > 3
    assert np.mean(shared) == pytest.approx(14 * 14 / N, abs=0.5)


def masks(found: list[Site]) -> list[tuple[bool, ...]]:
    return [tuple(elements(p).tolist()) for p in found]


def test_the_same_seed_gives_the_same_placebos_and_more_of_them_begin_with_the_fewer():
    five, twenty = (masks(sites.placebo(site("a row"), ones(), n=n, seed=3)) for n in (5, 20))
    assert twenty == masks(sites.placebo(site("a row"), ones(), n=20, seed=3))
    assert twenty[:5] == five


def test_draws_labels_and_seeds_each_give_other_placebos():
    by_draw = masks(sites.placebo(site("columns"), ones(), n=20))
    assert len(set(by_draw)) == 20
    other_seed = masks(sites.placebo(site("columns"), ones(), n=20, seed=1))
    relabelled = masks(sites.placebo(Site("other", SITES["columns"][0]), ones(), n=20))
    assert not {*by_draw} & {*other_seed}
    assert not {*by_draw} & {*relabelled}
    assert not {*other_seed} & {*relabelled}


def test_drawing_leaves_the_generators_and_the_differences_as_they_were():
    delta, before = differences(), differences()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    sites.placebo(site("columns"), delta)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    assert all(torch.equal(delta[name], before[name]) for name in delta)


# --- where there is none ----------------------------------------------------------------------------------


def test_half_of_the_sum_of_squares_has_a_placebo_and_more_than_half_has_none():
    assert N == 64
    half = Site("half", {"first.weight": (slice(0, 5),), "first.bias": ...})
    assert [int(elements(p).sum()) for p in sites.placebo(half, ones(), n=3)] == [32] * 3
    more = Site("more", {**half.covers, "scale": ...})
    assert sites.placebo(more, ones(), n=3) == []
    assert sites.placebo(Site("all", dict.fromkeys(SHAPES, ...)), ones()) == []


def test_a_site_that_does_not_differ_has_no_placebo():
    delta = differences()
    delta["first.bias"].zero_()
    assert sites.placebo(site("a whole tensor"), delta) == []
    assert sites.placebo(site("a row"), {name: torch.zeros(s) for name, s in SHAPES.items()}) == []


def test_what_is_no_parameter_counts_for_nothing():
    with_buffer = Site("a row", {"first.weight": (2,), "running_mean": ...})
    assert masks(sites.placebo(with_buffer, ones())) == masks(sites.placebo(site("a row"), ones()))
    assert sites.placebo(Site("buffers", {"running_mean": ...}), ones()) == []


def test_a_site_with_positions_is_refused():
    (located,) = sites.at_positions([site("a row")], {"tag": 0})
    with pytest.raises(ValueError, match=r"site 'a row @ tag' has positions; .* whole updates"):
        sites.placebo(located, ones())


# --- labels -----------------------------------------------------------------------------------------------


def test_a_placebo_says_whose_it_is_and_which_draw():
    found = sites.placebo(site("a row"), ones(), n=3)
    assert [p.label for p in found] == [f"placebo {i} of a row" for i in range(3)]
    assert [p.coords for p in found] == [
        {"level": "placebo", "component": "a row", "layer": -1, "head": -1, "draw": i} for i in range(3)
    ]
    assert results.PLACEBO == "placebo"
    assert all(p.positions is None for p in found)
    assert len(sites.placebo(site("a row"), ones())) == 20


# --- on a model -------------------------------------------------------------------------------------------


def recipe() -> dy.Recipe:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return dy.Recipe(model, loss, partial(torch.optim.AdamW, lr=0.05), max_grad_norm=0.5)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def points(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, generator=generator, dtype=torch.float64), torch.randint(
        3, (6,), generator=generator
    )


def contrasts(n: int) -> list[dy.Contrast]:
    return [dy.Contrast(points(3 * i), points(3 * i + 1), points(3 * i + 2)) for i in range(n)]


def by_loop(recipe: dy.Recipe, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Parameters after one ordinary step."""
    model = copy.deepcopy(recipe.model)
    optimizer = recipe.optimizer(model.parameters())
    loss(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("n", [1, 4])
def test_the_difference_of_steps_is_its_root_mean_square_over_contrasts(n):
    given = recipe()
    found = steps.update_difference(given, None, contrasts(n))
    assert list(found) == [name for name, _ in given.model.named_parameters()]
    each = [(by_loop(given, c.base), by_loop(given, c.source)) for c in contrasts(n)]
    for name, delta in found.items():
        several = torch.stack([source[name] - base[name] for base, source in each])
        torch.testing.assert_close(delta, several.square().mean(0).sqrt(), rtol=1e-9, atol=1e-15)
        assert (delta >= 0).all()
        if n == 1:
            torch.testing.assert_close(delta, several[0].abs(), rtol=1e-9, atol=1e-15)


def test_steps_that_are_the_same_do_not_differ_and_leave_the_model_alone():
    given, before = recipe(), recipe()
    same = [dy.Contrast(points(1), points(1), points(2))]
    assert all(not delta.any() for delta in steps.update_difference(given, None, same).values())
    for one, other in zip(given.model.parameters(), before.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is None


@pytest.mark.parametrize("verb", [dy.patch_updates, dy.patch_gradients])
def test_placebos_are_patched_beside_their_site_and_summarised_apart(verb):
    given, pairs = recipe(), contrasts(5)
    layer, row = sites.parameters(given.model)[0], Site("row", {"2.weight": (0,)})
    delta = steps.update_difference(given, None, pairs)
    placebos = [p for s in (layer, row) for p in sites.placebo(s, delta, 7)]
    assert len(placebos) in (7, 14)
    sites.check(placebos, given.model)
    found = verb(given, None, pairs, [layer, row, *placebos], loss)
    summary = statistics.summarize(found)
    assert summary["site"].values.tolist() == [layer.label, row.label]
    for label in summary["site"].values:
        own = [p.label for p in placebos if p.coords["component"] == label]
        sizes = [abs(found["effect"].sel(site=other).values.mean()) for other in own]
        expected = np.quantile(sizes, 0.95, method="weibull") if own else np.nan
        np.testing.assert_allclose(summary["placebo"].sel(site=label), expected)
    assert summary["placebo"].notnull().any()
    assert summary["placebo"].sel(site="row") > 0
    assert {"draw"} <= set(found.coords)


# --- a summary --------------------------------------------------------------------------------------------

SITE_LABELS = ["embed", "attn 0", "mlp 0"]
OF = {"embed": 20, "mlp 0": 7}  # none beside attn 0
PLACEBOS = [(f"placebo {i} of {label}", label) for label, n in OF.items() for i in range(n)]


def dataset(seed: int = 0, n_measures: int = 0, n_examples: int = 6, order: str = "after") -> xr.Dataset:
    """Effects of three sites and of the placebos of two, drawn at random."""
    rng = np.random.default_rng(seed)
    own = [(label, "components", label.split()[0]) for label in SITE_LABELS]
    theirs = [(label, "placebo", of) for label, of in PLACEBOS]
    rows = {"after": own + theirs, "before": theirs + own, "mixed": [own[0], *theirs, *own[1:]]}[order]
    shape = ((n_measures,) if n_measures else ()) + (n_examples,)
    named = {label: rng.normal(0.3, 1.0, shape) for label in sorted(label for label, *_ in rows)}
    base = rng.normal(2.0, 1.0, shape)
    return results.effects(
        np.stack([base + named[label] for label, *_ in rows], axis=-1),
        {"base": base, "source": base + rng.normal(1.5, 0.3, shape), "untouched": base - 0.1},
        {"example": [f"alias {i}" for i in range(n_examples)]},
        {
            "site": [row[0] for row in rows],
            "level": [row[1] for row in rows],
            "component": [row[2] for row in rows],
        },
        [f"measure {i}" for i in range(n_measures)] or None,
        ["logit"] * n_measures if n_measures else "logit",
        "{}",
    )


def by_hand(found: xr.Dataset, label: str, over: tuple[str, ...] = ("example",)) -> Any:
    """The 95th percentile of |mean| over a site's placebos, one mean and one quantile after another."""
    if label not in OF:
        return np.nan
    sizes = [np.abs(found["effect"].sel(site=name).mean(over)) for name, of in PLACEBOS if of == label]
    return np.quantile(np.stack([size.values for size in sizes]), 0.95, axis=0, method="weibull")


@pytest.mark.parametrize("order", ["after", "before", "mixed"])
def test_a_summary_gives_each_site_the_95th_percentile_of_its_placebos_sizes(order):
    found = dataset(order=order)
    summary = statistics.summarize(found)
    assert summary["site"].values.tolist() == SITE_LABELS
    for label in SITE_LABELS:
        np.testing.assert_allclose(summary["placebo"].sel(site=label), by_hand(found, label))
    assert np.isnan(summary["placebo"].sel(site="attn 0"))
    assert summary["placebo"].attrs["units"] == "logit"
    assert "quantile" not in summary.coords


def test_the_mean_is_taken_before_the_size():
    """Large effects of either sign are no effect: the mean of |effect| would be four here."""
    found = dataset(n_examples=6)
    theirs = found["level"].values == "placebo"
    found["effect"].values[:, theirs] = np.tile([[4.0], [-4.0]], (3, theirs.sum()))
    placebo = statistics.summarize(found)["placebo"]
    np.testing.assert_allclose(placebo.sel(site=["embed", "mlp 0"]), 0.0, atol=1e-12)


def test_placebos_change_nothing_else_in_a_summary():
    found = dataset()
    alone = statistics.summarize(found.sel(site=SITE_LABELS))
    assert "placebo" not in alone
    xr.testing.assert_identical(statistics.summarize(found).drop_vars("placebo"), alone)


def test_each_measure_and_optimizer_has_its_own_placebos():
    parts = [dataset(seed=i, n_measures=2) for i in range(2)]
    summary = statistics.summarize(results.concat(parts, "optimizer", ["fresh", "stored"]))
    assert set(summary["placebo"].dims) == {"optimizer", "measure", "site"}
    for optimizer, part in zip(("fresh", "stored"), parts, strict=True):
        for label in SITE_LABELS:
            cell = summary["placebo"].sel(optimizer=optimizer, site=label)
            np.testing.assert_allclose(cell, by_hand(part, label))


def test_with_a_dim_seed_a_placebos_effect_is_its_mean_over_runs():
    parts = [dataset(seed=i, n_measures=2) for i in range(4)]
    together = results.concat(parts, "seed", list(range(4)))
    summary = statistics.summarize(together)
    assert set(summary["placebo"].dims) == {"measure", "site"}
    for label in SITE_LABELS:
        np.testing.assert_allclose(
            summary["placebo"].sel(site=label), by_hand(together, label, ("example", "seed"))
        )
    averaged = results.concat([p.mean("example", keep_attrs=True) for p in parts], "seed", list(range(4)))
    xr.testing.assert_allclose(statistics.summarize(averaged), summary)
    alone = statistics.summarize(parts[0])["placebo"].sel(site="embed")
    assert (summary["placebo"].sel(site="embed") < alone).all()  # four runs' means are smaller than one's


def test_a_summary_with_placebos_survives_its_file_and_makes_a_table(tmp_path):
    summary = statistics.summarize(dataset())
    results.save(summary, tmp_path / "summary.h5")
    xr.testing.assert_identical(results.load(tmp_path / "summary.h5"), summary)
    assert [line.split("  ")[0] for line in statistics.table(summary).splitlines()[1:]].count("site") == 1
    assert "placebo 0" not in statistics.table(summary)


def test_placebos_without_their_site_say_nothing_of_the_others():
    summary = statistics.summarize(dataset().drop_sel(site=list(OF)))
    assert summary["site"].values.tolist() == ["attn 0"]
    assert np.isnan(summary["placebo"]).all()


def test_a_placebos_dims_stand_in_the_order_of_the_effects():
    summary = statistics.summarize(dataset(n_measures=2))
    assert summary["placebo"].dims == summary["effect"].dims


def test_placebos_are_refused_twice_over_by_their_labels():
    placebos = sites.placebo(Site("row", {"2.weight": (0,)}), {"2.weight": torch.ones(3, 8)}, 2)
    with pytest.raises(SiteError, match="occur more than once"):
        sites.check([*placebos, *placebos], recipe().model)
