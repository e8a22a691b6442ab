"""What a verb returns: dims, coordinates, references, measures."""

import json

import numpy as np
import pytest
import torch

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.sites import Site
from tests.zoo.small_models import (
    by_itself,
    classifier,
    classifier_recipe,
    margin,
    outcomes,
    points,
    same,
    spread,
    tokens,
    trained,
    transformer_recipe,
)

every_verb = pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])
PAIRS = [
    dy.Contrast(points(10), points(11), points(12), {"example": "first", "alias": 3, "set": "D1"}),
    dy.Contrast(points(13), points(14), points(15), {"example": "second", "alias": 5, "share": 0.5}),
]
REFERENCES = ("untouched", "base", "source", "coasted")


@pytest.fixture(scope="module")
def setting():
    recipe = classifier_recipe(max_grad_norm=0.1)
    return recipe, trained(recipe, [points(0), points(1)]).last, sites.parameters(recipe.model)


@every_verb
def test_a_measure_gives_example_by_site_and_references_by_example(verb, setting):
    result = verb(*setting[:2], PAIRS, setting[2], margin)
    assert set(result.data_vars) == {"effect", "patched", *REFERENCES}
    assert result["patched"].dims == result["effect"].dims == ("example", "site")
    assert all(result[name].dims == ("example",) for name in REFERENCES)
    assert result.sizes == {"example": 2, "site": 5}
    assert result["site"].values.tolist() == [site.label for site in setting[2]]
    np.testing.assert_array_equal(result["effect"], result["patched"] - result["base"])
    assert np.isfinite(result.to_array()).all()


@every_verb
def test_coordinates_of_contrasts_label_the_examples_and_those_of_sites_the_sites(verb, setting):
    result = verb(
        *setting[:2], PAIRS, [Site("one", {"head.bias": (1,)}, {"layer": 2, "kind": "unit"})], margin
    )
    assert result["example"].values.tolist() == ["first", "second"]
    assert result["alias"].values.tolist() == [3, 5]
    assert result["set"].values.tolist() == ["D1", ""]
    np.testing.assert_array_equal(result["share"], [np.nan, 0.5])
    assert result["layer"].values.tolist() == [2]
    assert result["head"].values.tolist() == [-1]
    assert result["kind"].values.tolist() == ["unit"]


@every_verb
def test_contrasts_without_coordinates_are_counted(verb, setting):
    pairs = [dy.Contrast(p.base, p.source, p.probe) for p in PAIRS]
    result = verb(*setting[:2], pairs, setting[2], margin)
    assert result["example"].values.tolist() == ["contrast 0", "contrast 1"]


@every_verb
def test_several_measures_become_a_dim_and_each_equals_the_measure_alone(verb, setting):
    measures = {"the margin": margin, "the spread": spread}
    result = verb(*setting[:2], PAIRS, setting[2], measures)
    assert result["patched"].dims == ("measure", "example", "site")
    assert result["base"].dims == ("measure", "example")
    assert result["measure"].values.tolist() == ["the margin", "the spread"]
    for name, measure in measures.items():
        alone = verb(*setting[:2], PAIRS, setting[2], measure)
        for variable in ("patched", "effect", *REFERENCES):
            np.testing.assert_array_equal(result[variable].sel(measure=name), alone[variable])


@every_verb
def test_a_single_measure_in_a_dict_still_has_the_dim(verb, setting):
    assert verb(*setting[:2], PAIRS, setting[2], {"margin": margin}).sizes["measure"] == 1


@every_verb
def test_a_measure_of_rows_is_averaged_and_a_scalar_taken_as_it_is(verb, setting):
    rows, mean = (
        verb(*setting[:2], PAIRS, setting[2], measure)
        for measure in (margin, lambda model, batch: margin(model, batch).mean())
    )
    assert rows.drop_attrs().identical(mean.drop_attrs())


@pytest.mark.parametrize("kind", ["booleans", "integers", "a number"])
def test_a_measure_may_return_what_counts_as_a_number(kind, setting):
    def right(model, batch):
        found = model(batch[0]).argmax(-1) == batch[1]
        return {"booleans": found, "integers": found.long(), "a number": found.double().mean().item()}[kind]

    recipe, checkpoint, patched = setting
    result = dy.patch_updates(recipe, checkpoint, PAIRS, patched, right)
    as_floats = dy.patch_updates(
        recipe, checkpoint, PAIRS, patched, lambda m, b: (m(b[0]).argmax(-1) == b[1]).double()
    )
    np.testing.assert_array_equal(result["patched"], as_floats["patched"])


def test_measures_of_the_logits_share_a_forward_pass_and_keep_their_units():
    recipe = transformer_recipe()
    checkpoint = trained(recipe, [tokens(0)]).last
    passes = []
    recipe.model.register_forward_hook(lambda module, inputs, output: passes.append(module.training))
    names = ("correct_logit", "centred_logit", "correct_log_prob", "probability", "logit_difference")
    pair = dy.Contrast(tokens(1), tokens(2), tokens(3))
    patched = sites.heads(recipe.model)
    measures = {name: dy.measures.by_name(name) for name in names}
    result = dy.patch_updates(recipe, checkpoint, [pair], patched, measures)
    assert passes.count(True) == 2
    n_passes = len(passes)
    assert result["units"].values.tolist() == ["logit", "logit", "nat", "probability", "logit"]
    alone = dy.patch_updates(recipe, checkpoint, [pair], patched, dy.measures.probability)
    assert len(passes) == 2 * n_passes
    assert alone["patched"].attrs["units"] == "probability"


@every_verb
def test_a_result_names_its_verb_step_and_measures(verb, setting):
    facts = json.loads(verb(*setting[:2], PAIRS, setting[2], margin).attrs["provenance"])
    assert (facts["verb"], facts["step"], facts["measure"]) == (verb.__name__, 2, ["margin"])


@pytest.mark.slow
@every_verb
def test_a_site_depends_on_none_beside_it_and_a_contrast_to_rounding(verb, setting):
    recipe, checkpoint, patched = setting
    many, measure = relabelled(patched * 4), by_itself(margin)
    together = verb(recipe, checkpoint, PAIRS, many, measure)
    for i, pair in enumerate(PAIRS):
        each = verb(recipe, checkpoint, [pair], many, measure)
        for name in ("patched", "base", "source"):
            assert float(abs(each[name][0] - together[name][i]).max()) <= 1e-12
        for j, site in enumerate(many):
            alone = verb(recipe, checkpoint, [pair], [site], measure)
            assert each["patched"][0, j].item() == alone["patched"].item()
            assert each["base"].item() == alone["base"].item()


def relabelled(patched):
    return [Site(f"{i}", site.covers) for i, site in enumerate(patched)]


@every_verb
def test_a_reversed_contrast_exchanges_the_references_and_completes_the_exchange(verb, setting):
    recipe, checkpoint, _ = setting
    pair = PAIRS[0]
    assert pair.reversed().reversed() == pair
    assert (pair.reversed().base, pair.reversed().source) == (pair.source, pair.base)
    assert pair.reversed().probe is pair.probe
    assert pair.reversed().coords == pair.coords
    mask = torch.zeros(8, 5, dtype=torch.bool)
    mask[2:4] = True
    encoder = Site("rows", {"encoder.weight": mask})
    rest = Site(
        "the rest",
        {"encoder.weight": ~mask}
        | dict.fromkeys(("encoder.bias", "head.weight", "head.bias", "temperature"), ...),
    )
    there = verb(recipe, checkpoint, [pair], [encoder], by_itself(margin))
    back = verb(recipe, checkpoint, [pair.reversed()], [rest], by_itself(margin))
    assert there["base"].item() == back["source"].item()
    assert there["source"].item() == back["base"].item()
    assert there["patched"].item() == back["patched"].item()


@every_verb
def test_without_a_checkpoint_the_model_as_it_stands_is_stepped_by_a_new_optimizer(verb):
    recipe = classifier_recipe(model=classifier(norm=True, dropout=0.3), max_grad_norm=0.1)
    patched = [*sites.parameters(recipe.model), sites.everything(recipe.model)]
    torch.manual_seed(5)
    standing = outcomes(verb, recipe, None, PAIRS[0], patched)
    torch.manual_seed(5)
    captured = Checkpoint.capture(recipe.model)
    bare = outcomes(verb, recipe, captured, PAIRS[0], patched)
    torch.manual_seed(5)
    optimizer = recipe.optimizer(recipe.model.parameters())
    fresh = outcomes(verb, recipe, Checkpoint.capture(recipe.model, optimizer), PAIRS[0], patched)
    for name, tensors in standing.items():
        assert same(tensors, bare[name])
        assert same(tensors, fresh[name])
    assert same(standing["untouched"], captured.parameters | captured.buffers)


@pytest.mark.parametrize("start", ["None", "without an optimizer"])
@every_verb
def test_a_new_optimizer_begins_at_the_rate_its_scheduler_sets(verb, start):
    """As replay begins it, and as training did."""

    def warm_up(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))

    recipe = classifier_recipe(scheduler=warm_up)
    captured = Checkpoint.capture(recipe.model)
    found = outcomes(
        verb, recipe, None if start == "None" else captured, PAIRS[0], sites.parameters(recipe.model)
    )
    expected = dy.steps.replay(recipe, captured, PAIRS[0].base).parameters
    for name, tensor in expected.items():
        assert torch.allclose(found["base"][name], tensor, rtol=0, atol=1e-12)


@every_verb
def test_without_recorded_generators_base_and_source_still_draw_the_same(verb):
    recipe = classifier_recipe(model=classifier(dropout=0.5))
    captured = Checkpoint.capture(recipe.model)
    unknown = Checkpoint(captured.step, captured.parameters, {}, None, None, None, captured.fingerprint)
    pair = dy.Contrast(points(1), points(1), points(2))
    assert (verb(recipe, unknown, [pair], sites.parameters(recipe.model), margin)["effect"] == 0).all()


@every_verb
@pytest.mark.parametrize("missing", ["contrasts", "sites"])
def test_nothing_to_patch_is_said_to_be_nothing(verb, missing, setting):
    recipe, checkpoint, patched = setting
    pairs, patched = ([], patched) if missing == "contrasts" else (PAIRS, [])
    with pytest.raises(ValueError, match=f"given no {missing}"):
        verb(recipe, checkpoint, pairs, patched, margin)
