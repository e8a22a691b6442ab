"""Interactions, Shapley values, both directions and unions, beside their definitions written out."""

from dataclasses import replace
from functools import partial
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dynamics as dy
from dynamics import results, sites
from dynamics.sites import Site, SiteError
from dynamics.trees import mask
from tests.zoo.small_models import (
    CLIPS,
    classifier,
    classifier_recipe,
    draws,
    examples,
    margin,
    points,
    spread,
    tokens,
    trained,
    transformer_recipe,
)

REFERENCES = ("untouched", "base", "source", "coasted")
MEASURES = {"margin": margin, "spread": spread}
PAIRS = [
    dy.Contrast(points(10), points(11), points(12), {"alias": 3}),
    dy.Contrast(points(13), points(14), points(15), {"alias": 5}),
]

every_verb = pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])


@pytest.fixture(scope="module")
def setting():
    recipe = classifier_recipe(model=classifier(norm=True, dropout=0.3), clip=CLIPS["by norm"])
    return recipe, trained(recipe, [points(seed) for seed in range(3)]).last


def groups():
    """A whole module, a row and a column that cross, a mask, statistics: some overlap."""
    scattered = torch.rand(8, 5, generator=draws(0)) < 0.4
    return [
        Site("head", {"head.weight": ..., "head.bias": ...}),
        Site("row", {"encoder.weight": (3,), "encoder.bias": (3,)}),
        Site("column", {"encoder.weight": (slice(None), torch.tensor([1, 4])), "head.bias": (0,)}),
        Site("mask", {"encoder.weight": scattered, "temperature": ...}),
        Site("norm", {"norm.weight": ..., "norm.bias": ..., "norm.running_mean": ...}),
    ]


def by_hand(model, members):
    """The union of sites as one boolean mask for each tensor, made without `union`."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    covers = {}
    for site in members:
        for name, index in site.covers.items():
            covered = covers.setdefault(name, torch.zeros(tensors[name].shape, dtype=torch.bool))
            covered[index] = True
    return Site(" with ".join(site.label for site in members), covers)


def effects_of(verb, recipe, checkpoint, contrasts, coalitions):
    """The effect of each coalition: frozenset of labels -> [measure, example]."""
    made = [by_hand(recipe.model, members) for members in coalitions]
    effect = verb(recipe, checkpoint, contrasts, made, MEASURES)["effect"].values
    return {frozenset(s.label for s in members): effect[..., i] for i, members in enumerate(coalitions)}


def subsets(members):
    return [c for size in range(1, len(members) + 1) for c in combinations(members, size)]


# --- interactions -----------------------------------------------------------------------------------------


@every_verb
def test_an_interaction_is_the_effect_of_both_less_the_effect_of_each(verb, setting):
    patched = groups()
    result = dy.interactions(*setting, PAIRS, patched, MEASURES, verb)
    found = effects_of(verb, *setting, PAIRS, [c for c in subsets(patched) if len(c) < 3])
    assert result["interaction"].dims == ("measure", "example", "site", "other")
    for one, other in combinations([site.label for site in patched], 2):
        expected = found[frozenset((one, other))] - found[frozenset((one,))] - found[frozenset((other,))]
        for site, beside in ((one, other), (other, one)):
            given_back = result["interaction"].sel(site=site, other=beside).values
            np.testing.assert_allclose(given_back, expected, rtol=0, atol=1e-14)
        assert (abs(expected) > 1e-9).all()


@every_verb
def test_interactions_come_with_what_the_verb_gives_for_the_sites_alone(verb, setting):
    patched = groups()
    result = dy.interactions(*setting, PAIRS, patched, margin, verb)
    alone = verb(*setting, PAIRS, patched, margin)
    xr.testing.assert_identical(result.drop_vars(["interaction", "other"]).drop_attrs(), alone.drop_attrs())
    assert result["interaction"].dims == ("example", "site", "other")
    assert result["other"].values.tolist() == result["site"].values.tolist() == [s.label for s in patched]
    assert result["interaction"].attrs["units"] == result["effect"].attrs["units"]


@every_verb
def test_interactions_are_symmetric_and_a_site_has_none_with_itself(verb, setting):
    found = dy.interactions(*setting, PAIRS, groups(), MEASURES, verb)["interaction"]
    np.testing.assert_array_equal(found, found.values.swapaxes(-1, -2))
    assert (np.diagonal(found.values, axis1=-2, axis2=-1) == 0).all()


def linear(model, batch):
    """A fixed linear function of every parameter and buffer."""
    generator = draws(7)
    total = torch.zeros((), dtype=torch.float64)
    for _, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        total = total + (torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * tensor).sum()
    return total


def test_updates_do_not_interact_in_a_linear_measure_but_where_sites_overlap(setting):
    patched = groups()
    result = dy.interactions(*setting, PAIRS, patched, linear, dy.patch_updates)
    for one, other in combinations(patched, 2):
        both = {}
        for name in one.covers.keys() & other.covers.keys():
            shape = setting[0].model.state_dict()[name].shape
            shared = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
            for covered, site in zip(shared, (one, other), strict=True):
                covered[site.covers[name]] = True
            if (shared[0] & shared[1]).any():
                both[name] = shared[0] & shared[1]
        expected = 0.0
        if both:
            overlap = dy.patch_updates(*setting, PAIRS, [Site("overlap", both)], linear)
            expected = -overlap["effect"].values[:, 0]
            assert (abs(expected) > 1e-6).all()
        found = result["interaction"].sel(site=one.label, other=other.label).values
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_gradients_interact_through_the_clip_norm_even_in_a_linear_measure(setting):
    patched = sites.parameters(setting[0].model)
    clipped = dy.interactions(*setting, PAIRS, patched, linear, dy.patch_gradients)["interaction"]
    recipe = dy.Recipe(setting[0].model, setting[0].loss, setting[0].optimizer)
    free = dy.interactions(recipe, setting[1], PAIRS, patched, linear, dy.patch_gradients)["interaction"]
    assert abs(clipped).max() > 1e-6
    assert abs(free).max() < 1e-12


@every_verb
def test_a_site_covered_twice_interacts_by_less_its_own_effect(verb, setting):
    """Exchanged twice is exchanged once: effect(S ∪ S) − 2 effect(S) = −effect(S)."""
    one, other = Site("one", {"head.weight": (1,)}), Site("other", {"head.weight": (slice(1, 2),)})
    result = dy.interactions(*setting, PAIRS, [one, other], MEASURES, verb)
    found = result["interaction"].sel(site="one", other="other")
    np.testing.assert_array_equal(found, -result["effect"].sel(site="one"))


@every_verb
def test_a_batch_exchanged_with_itself_has_no_interactions(verb, setting):
    pair = dy.Contrast(points(10), points(10), points(12))
    result = dy.interactions(*setting, [pair], groups(), MEASURES, verb)
    assert (result["interaction"] == 0).all()


def test_one_site_has_an_interaction_of_zero_with_itself_alone(setting):
    result = dy.interactions(*setting, PAIRS, groups()[:1], margin)
    assert result["interaction"].values.tolist() == [[[0.0]], [[0.0]]]


# --- Shapley values ---------------------------------------------------------------------------------------


def shapley_by_permutations(found, labels):
    """Each site's mean gain over all orders in which the sites could be patched."""
    orders = list(permutations(labels))
    shares = dict.fromkeys(labels, 0.0)
    for order in orders:
        for place, label in enumerate(order):
            before, after = frozenset(order[:place]), frozenset(order[: place + 1])
            shares[label] = shares[label] + (found[after] - found.get(before, 0.0)) / len(orders)
    return shares


@every_verb
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_a_shapley_value_is_the_mean_gain_over_all_orders_of_patching(verb, n, setting):
    patched = groups()[:n]
    result = dy.shapley_values(*setting, PAIRS, patched, MEASURES, verb)
    found = effects_of(verb, *setting, PAIRS, subsets(patched))
    assert result["shapley"].dims == ("measure", "example", "site")
    for label, share in shapley_by_permutations(found, [s.label for s in patched]).items():
        np.testing.assert_allclose(result["shapley"].sel(site=label), share, rtol=0, atol=1e-14)
    together = found[frozenset(site.label for site in patched)]
    np.testing.assert_allclose(result["together"], together, rtol=0, atol=1e-14)
    assert result["together"].dims == ("measure", "example")


@pytest.mark.slow
@every_verb
def test_shapley_values_add_up_to_the_effect_of_all_sites_together(verb, setting):
    model = setting[0].model
    everything = [Site(f"{i}", {name: ...}) for i, name in enumerate(dict(model.named_parameters()))]
    buffers = Site("buffers", {name: ... for name, _ in model.named_buffers()})
    result = dy.shapley_values(*setting, PAIRS, [*everything[:5], buffers], MEASURES, verb)
    np.testing.assert_allclose(result["shapley"].sum("site"), result["together"], rtol=0, atol=1e-13)
    rest = Site("the rest", {name: ... for site in everything[4:] for name in site.covers})
    whole = dy.shapley_values(*setting, PAIRS, [*everything[:4], rest, buffers], MEASURES, verb)
    np.testing.assert_array_equal(whole["together"], whole["source"] - whole["base"])


@every_verb
def test_shapley_values_come_with_what_the_verb_gives_for_the_sites_alone(verb, setting):
    patched = groups()[:3]
    result = dy.shapley_values(*setting, PAIRS, patched, margin, verb)
    alone = verb(*setting, PAIRS, patched, margin)
    xr.testing.assert_identical(result.drop_vars(["shapley", "together"]).drop_attrs(), alone.drop_attrs())
    assert result["shapley"].attrs["units"] == result["together"].attrs["units"] == ""
    one = dy.shapley_values(*setting, PAIRS, patched[:1], margin, verb)
    np.testing.assert_array_equal(one["shapley"], one["effect"])
    np.testing.assert_array_equal(one["together"], one["effect"].isel(site=0))


def test_updates_that_do_not_interact_keep_their_own_effect(setting):
    patched = sites.parameters(setting[0].model)[:4]
    result = dy.shapley_values(*setting, PAIRS, patched, linear, dy.patch_updates)
    np.testing.assert_allclose(result["shapley"], result["effect"], rtol=0, atol=1e-13)


@every_verb
def test_sites_that_do_the_same_share_alike_and_a_site_that_does_nothing_gets_nothing(verb, setting):
    empty = {"head.weight": torch.zeros(3, 8, dtype=torch.bool)}
    patched = [
        Site("one", {"head.weight": ...}),
        Site("the same", {"head.weight": torch.ones(3, 8, dtype=torch.bool)}),
        Site("nothing", empty),
        Site("another", {"encoder.weight": (2,)}),
    ]
    shares = dy.shapley_values(*setting, PAIRS, patched, MEASURES, verb)["shapley"]
    np.testing.assert_allclose(shares.sel(site="one"), shares.sel(site="the same"), rtol=0, atol=1e-15)
    np.testing.assert_allclose(shares.sel(site="nothing"), 0, rtol=0, atol=1e-15)
    assert (abs(shares.sel(site=["one", "another"])) > 1e-9).all()


def test_eight_groups_are_divided_and_nine_refused_with_what_to_do(setting):
    nine = [Site(f"unit {i}", {"encoder.weight": (i,)}) for i in range(8)]
    nine.append(Site("head", {"head.weight": ...}))
    steps = []

    def verb(recipe, checkpoint, contrasts, patched, measure):
        steps.extend(site.label for site in patched)
        return dy.patch_updates(recipe, checkpoint, contrasts, patched, measure)

    result = dy.shapley_values(*setting, PAIRS[:1], nine[:8], margin, verb)
    assert len(steps) == len(set(steps)) == 2**8 - 1
    np.testing.assert_allclose(result["shapley"].sum("site"), result["together"], rtol=0, atol=1e-13)
    steps.clear()
    with pytest.raises(SiteError, match=r"of 9 sites take 2\^9 steps.*at most 8, joined by sites\.union"):
        dy.shapley_values(*setting, PAIRS, nine, margin, verb)
    assert steps == []


@pytest.mark.parametrize("call", [dy.interactions, dy.shapley_values])
@every_verb
def test_nothing_to_patch_is_said_to_be_nothing(call, verb, setting):
    with pytest.raises(ValueError, match=f"{verb.__name__} was given no sites"):
        call(*setting, PAIRS, [], margin, verb)
    with pytest.raises(ValueError, match=f"{verb.__name__} was given no contrasts"):
        call(*setting, [], groups(), margin, verb)


@pytest.mark.parametrize("call", [dy.interactions, dy.shapley_values])
def test_sites_at_different_positions_have_no_union_and_those_at_the_same_do(call):
    recipe = transformer_recipe(max_grad_norm=0.1)
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last
    pair = dy.Contrast(tokens(2), tokens(3), tokens(4))
    whole = sites.heads(recipe.model)[:2]
    apart = sites.at_positions(whole[:1], {"first": 0, "last": 3})
    with pytest.raises(SiteError, match="all with the same positions or all without"):
        call(recipe, checkpoint, [pair], apart, dy.measures.correct_logit)
    located = sites.at_positions(whole, {"first": 0})
    result = call(recipe, checkpoint, [pair], located, dy.measures.correct_logit)
    union = sites.at_positions([by_hand(recipe.model, whole)], {"first": 0})
    both = dy.patch_gradients(recipe, checkpoint, [pair], union, dy.measures.correct_logit)
    together = both["effect"].isel(site=0).values
    if call is dy.shapley_values:
        np.testing.assert_allclose(result["together"], together, rtol=0, atol=1e-13)
    else:
        expected = together - result["effect"].sum("site").values
        np.testing.assert_allclose(result["interaction"].values[:, 0, 1], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("call", [dy.interactions, dy.shapley_values])
def test_a_union_may_stand_beside_the_sites_it_is_made_of(call, setting):
    members = groups()[:2]
    patched = [*members, sites.union(setting[0].model, members)]
    result = call(*setting, PAIRS, patched, margin)
    assert result["site"].values.tolist() == ["head", "row", "head + row"]


# --- unions -----------------------------------------------------------------------------------------------


SHAPE = (4, 3)


def parts(size):
    """An int, a slice or a list of places along one axis."""
    place = st.integers(-size, size - 1)
    slices = st.builds(slice, st.integers(0, size - 1), st.none(), st.sampled_from([None, 1, 2]))
    return place | slices


indices = st.one_of(
    st.just(...),
    st.tuples(parts(4)),
    st.tuples(parts(4), parts(3)),
    st.tuples(st.lists(st.integers(-4, 3), min_size=1, max_size=3).map(torch.tensor)),
    st.lists(st.booleans(), min_size=12, max_size=12).map(lambda bits: torch.tensor(bits).reshape(SHAPE)),
)


@examples
@given(several=st.lists(indices, min_size=1, max_size=4))
def test_a_union_reaches_what_any_of_its_sites_reaches(several):
    model = nn.Linear(3, 4, bias=False)
    members = [Site(f"{i}", {"weight": index}) for i, index in enumerate(several)]
    expected = torch.zeros(SHAPE, dtype=torch.bool)
    for index in several:
        expected[index] = True
    found = sites.union(model, members)
    sites.check([found], model)
    assert torch.equal(mask(found.covers["weight"], torch.Size(SHAPE), torch.device("cpu")), expected)
    backwards = sites.union(model, members[::-1])
    assert torch.equal(mask(backwards.covers["weight"], torch.Size(SHAPE), torch.device("cpu")), expected)


def test_a_union_takes_its_labels_together_or_the_one_it_is_given():
    model = classifier()
    first, second = groups()[:2]
    found = sites.union(model, [first, second])
    assert found.label == "head + row"
    assert found.coords == {"level": "union", "component": "head + row", "layer": -1, "head": -1}
    assert sites.union(model, [first, second], "both").label == "both"
    assert sites.union(model, [first]).label == "head"
    assert found.positions is None
    assert set(found.covers) == set(first.covers) | set(second.covers)


def test_a_union_of_masks_leaves_its_sites_as_they_were():
    one, other = torch.eye(8, 5, dtype=torch.bool), ~torch.eye(8, 5, dtype=torch.bool)
    before = one.clone(), other.clone()
    members = [Site("one", {"encoder.weight": one}), Site("other", {"encoder.weight": other})]
    found = sites.union(classifier(), members)
    assert found.covers["encoder.weight"].all()
    assert torch.equal(one, before[0])
    assert torch.equal(other, before[1])
    assert [len(site.covers) for site in members] == [1, 1]


def test_a_union_keeps_the_positions_its_sites_share():
    model = classifier()
    one = Site("one", {"head.weight": ...}, positions=(1, 2))
    other = Site("other", {"head.bias": ...}, positions=(1, 2))
    assert sites.union(model, [one, other]).positions == (1, 2)
    for positions in (None, (1,), (2, 1)):
        with pytest.raises(SiteError, match="all with the same positions or all without"):
            sites.union(model, [one, replace(other, positions=positions)])


def test_a_union_of_nothing_of_the_same_label_twice_or_of_what_is_not_there_is_refused():
    model = classifier()
    with pytest.raises(SiteError, match="one or more sites"):
        sites.union(model, [])
    with pytest.raises(SiteError, match="head occur more than once"):
        sites.union(model, [groups()[0], groups()[0]])
    with pytest.raises(SiteError, match=r"covers 'norm\.weight', but the model has"):
        sites.union(model, groups())
    with pytest.raises(SiteError, match="reads index 8 on axis 0"):
        sites.union(model, [Site("far", {"encoder.weight": (8,)})])


@every_verb
def test_the_union_of_every_parameter_and_buffer_is_everything(verb, setting):
    model = setting[0].model
    buffers = Site("buffers", {name: ... for name, _ in model.named_buffers()})
    whole = sites.union(model, [*sites.parameters(model), buffers])
    result = verb(*setting, PAIRS, [whole, sites.everything(model)], MEASURES)
    np.testing.assert_array_equal(result["patched"].isel(site=0), result["source"])
    np.testing.assert_array_equal(result["patched"].isel(site=1), result["source"])


# --- both directions --------------------------------------------------------------------------------------


def language(name):
    """A transformer after two steps, and a contrast of what a verb compares: batches, or sequences of them."""
    recipe = transformer_recipe(max_grad_norm=0.1)
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last
    base, source = [tokens(2), tokens(5)], [tokens(3), tokens(6)]
    batches = (base, source) if name == "window" else (base[0], source[0])
    return recipe, checkpoint, dy.Contrast(*batches, tokens(4), {"alias": 1})


def given_to(verb, model):
    """What each verb patches."""
    return (
        sites.activations(model, "blocks.*.hook_resid_pre")
        if "signals" in str(verb)
        else sites.heads(model)[:2]
    )


VERBS = {
    "gradients": dy.patch_gradients,
    "updates": dy.patch_updates,
    "factors": dy.patch_factors,
    "signals": dy.patch_signals,
    "signals, source forward": partial(dy.patch_signals, forward="source"),
    "window": partial(dy.patch_window, measured_after=[1, 2]),
    "interactions": dy.interactions,
    "shapley values": dy.shapley_values,
}


def called(name, contrast, recipe, checkpoint, both=False, measure=dy.measures.correct_logit):
    verb = VERBS[name]
    patched = given_to(name, recipe.model)
    if both:
        return dy.both_directions(verb, recipe, checkpoint, [contrast], patched, measure)
    return verb(recipe, checkpoint, [contrast], patched, measure)


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_both_directions_are_two_calls_side_by_side(name):
    recipe, checkpoint, contrast = language(name)
    both = called(name, contrast, recipe, checkpoint, both=True)
    assert both["direction"].values.tolist() == ["sufficiency", "necessity"]
    for direction, pair in (("sufficiency", contrast), ("necessity", contrast.reversed())):
        alone = called(name, pair, recipe, checkpoint)
        part = both.sel(direction=direction, drop=True)
        assert set(part.variables) == set(alone.variables)
        for variable in alone.variables:
            np.testing.assert_array_equal(part[variable].values, alone[variable].values)
    np.testing.assert_array_equal(
        both["base"].sel(direction="sufficiency"), both["source"].sel(direction="necessity")
    )
    assert (both["base"].isel(direction=0) != both["base"].isel(direction=1)).all()


def test_where_sites_do_not_interact_the_two_directions_differ_in_sign_alone(setting):
    patched = sites.parameters(setting[0].model)
    for pair in PAIRS:  # by itself: the bias before a batch norm has a gradient of nothing but rounding
        both = dy.both_directions(dy.patch_updates, *setting, [pair], patched, linear)["effect"]
        np.testing.assert_allclose(
            both.sel(direction="necessity"), -both.sel(direction="sufficiency"), atol=1e-13
        )
    clipped = dy.both_directions(dy.patch_gradients, *setting, PAIRS, patched, linear)["effect"]
    assert abs(clipped.sum("direction")).max() > 1e-6


def test_the_antisymmetric_effect_turns_where_base_and_source_change_places(setting):
    patched = sites.parameters(setting[0].model)
    halves = [
        dy.statistics.antisymmetric(
            dy.both_directions(dy.patch_gradients, *setting, contrasts, patched, linear)
        )
        for contrasts in (PAIRS, [pair.reversed() for pair in PAIRS])
    ]
    one, turned = (half["effect"].values for half in halves)
    assert abs(one).max() > 1e-6
    np.testing.assert_allclose(one, -turned, rtol=0, atol=1e-12)
    mixing, again = (half["mixing"].values for half in halves)
    assert abs(mixing).max() > 1e-6
    np.testing.assert_allclose(mixing, again, rtol=0, atol=1e-12)
    brought = dy.patch_gradients(*setting, PAIRS, patched, linear)
    np.testing.assert_allclose(one + mixing, brought["effect"].values, rtol=0, atol=1e-12)
    assert halves[0]["effect"].attrs == brought["effect"].attrs
    assert set(halves[0].dims) == {"example", "site"}
    dy.statistics.table(dy.statistics.summarize(halves[0]))


def test_one_direction_has_no_antisymmetric_part(setting):
    patched = sites.parameters(setting[0].model)
    one = dy.patch_updates(*setting, PAIRS, patched, linear)
    with pytest.raises(ValueError, match=r"not both directions.*dy\.both_directions"):
        dy.statistics.antisymmetric(one)
    both = dy.both_directions(dy.patch_updates, *setting, PAIRS, patched, linear)
    with pytest.raises(ValueError, match="not both directions"):
        dy.statistics.antisymmetric(both.sel(direction="necessity"))


def test_directions_keep_the_measures_and_the_facts_they_share():
    recipe, checkpoint, contrast = language("gradients")
    measures = {name: dy.measures.by_name(name) for name in ("correct_logit", "probability")}
    both = called("gradients", contrast, recipe, checkpoint, both=True, measure=measures)
    assert set(both["effect"].dims) == {"direction", "measure", "example", "site"}
    assert both["units"].values.tolist() == ["logit", "probability"]
    assert '"verb": "patch_gradients"' in both.attrs["provenance"]


# --- kept -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "both"), [*((name, False) for name in VERBS), ("factors", True), ("window", True)]
)
def test_every_result_is_the_same_after_it_was_saved_and_loaded(name, both, tmp_path):
    recipe, checkpoint, contrast = language(name)
    measures = {name: dy.measures.by_name(name) for name in ("correct_logit", "probability")}
    result = called(name, contrast, recipe, checkpoint, both=both, measure=measures)
    results.save(result, tmp_path / "result.nc")
    xr.testing.assert_identical(results.load(tmp_path / "result.nc"), result)
    assert set(map(str, result.dims)) <= set(results.DIMS)
    further = {"factors": "factor", "window": "step", "interactions": "other"}
    assert name not in further or further[name] in result.dims
