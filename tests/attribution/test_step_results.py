"""What the attribution verbs return, which parts they count, and what they refuse."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import results, sites
from dynamics.sites import Site, SiteError
from dynamics.sites.fine import neurons, rows
from dynamics.steps import NonFiniteGradient
from tests.zoo.small_models import (
    Tied,
    by_itself,
    classifier,
    classifier_loss,
    classifier_recipe,
    margin,
    points,
    spread,
    tied,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)

PAIRS = [
    dy.Contrast(points(10), points(11), points(12), {"example": "first", "alias": 3, "set": "D1"}),
    dy.Contrast(points(13), points(14), points(15), {"example": "second", "alias": 5}),
]
REFERENCES = {"untouched", "base", "source", "coasted"}
methods = pytest.mark.parametrize("method", ["first_order", "integrated"])


@pytest.fixture(scope="module")
def setting():
    recipe = classifier_recipe(max_grad_norm=0.1)
    return recipe, trained(recipe, [points(0), points(1)]).last, sites.parameters(recipe.model)


# --- a result ---------------------------------------------------------------------------------------------


@methods
def test_it_has_the_coordinates_references_and_units_of_a_patched_step(method, setting, tmp_path):
    exchanged = dy.patch_updates(*setting[:2], PAIRS, setting[2], by_itself(margin))
    found = dy.attribute_step(*setting[:2], PAIRS, setting[2], by_itself(margin), method)
    assert set(found.data_vars) == {"attribution", "residual", "nodes", *REFERENCES}
    assert found["attribution"].dims == ("example", "site")
    assert found["residual"].dims == found["nodes"].dims == ("example",)
    for name in (*REFERENCES, *exchanged.coords):
        assert found[name].identical(exchanged[name])
    facts = json.loads(found.attrs["provenance"])
    assert (facts["verb"], facts["step"], facts["measure"]) == ("attribute_step", 2, ["margin"])
    results.save(found, tmp_path / "found.h5")
    assert results.load(tmp_path / "found.h5").identical(found)


@methods
def test_several_measures_become_a_dim_and_each_equals_the_measure_alone(method, setting):
    measures = {"the margin": margin, "the spread": spread}
    found = dy.attribute_step(*setting[:2], PAIRS, setting[2], measures, method)
    assert found["attribution"].dims == ("measure", "example", "site")
    assert found["nodes"].dims == found["base"].dims == ("measure", "example")
    for name, measure in measures.items():
        alone = dy.attribute_step(*setting[:2], PAIRS, setting[2], measure, method)
        for variable in alone.data_vars:
            np.testing.assert_array_equal(found[variable].sel(measure=name), alone[variable])


def test_measures_of_logits_keep_their_units_and_share_the_verbs_arguments():
    recipe = transformer_recipe()
    checkpoint = trained(recipe, [tokens(0)]).last
    pair = dy.Contrast(tokens(1), tokens(2), tokens(3))
    measures = {name: dy.measures.by_name(name) for name in ("correct_logit", "correct_log_prob")}
    found = dy.attribute_step(recipe, checkpoint, [pair], sites.heads(recipe.model), measures)
    assert found["units"].values.tolist() == ["logit", "nat"]
    alone = dy.attribute_step(
        recipe, checkpoint, [pair], sites.heads(recipe.model), measures["correct_log_prob"]
    )
    for name in ("attribution", "residual", "base"):
        assert (
            results.units(alone, name) == results.units(found.sel(measure="correct_log_prob"), name) == "nat"
        )
    assert results.units(alone, "nodes") == "1"


@pytest.mark.slow
@methods
def test_a_site_depends_on_none_beside_it_and_a_contrast_to_rounding(method, setting):
    together = dy.attribute_step(*setting[:2], PAIRS, setting[2], margin, method)
    for i, pair in enumerate(PAIRS):
        by_itself = dy.attribute_step(*setting[:2], [pair], setting[2], margin, method)
        for name in ("attribution", "residual"):
            assert float(abs(by_itself[name][0] - together[name][i]).max()) <= 1e-12
        for j, site in enumerate(setting[2]):
            alone = dy.attribute_step(*setting[:2], [pair], [site], margin, method)
            assert by_itself["attribution"][0, j].item() == alone["attribution"].item()
            assert by_itself["residual"].item() == alone["residual"].item()


def test_without_a_checkpoint_the_model_as_it_stands_is_stepped_by_a_new_optimizer(setting):
    recipe, _, patched = setting
    found = dy.attribute_step(recipe, None, PAIRS, patched, by_itself(margin))
    exchanged = dy.patch_updates(recipe, None, PAIRS, patched, by_itself(margin))
    for name in REFERENCES:
        np.testing.assert_array_equal(found[name], exchanged[name])


def test_results_join_along_steps_and_both_directions(setting):
    recipe, checkpoint, patched = setting
    both = dy.both_directions(dy.attribute_step, recipe, checkpoint, PAIRS, patched, margin)
    assert both["attribution"].dims == ("direction", "example", "site")
    there, back = both["attribution"].values
    np.testing.assert_allclose(there, -back, rtol=0, atol=1e-12)
    parts = [dy.attribute_examples(recipe, checkpoint, points(seed), PAIRS, margin) for seed in (1, 2)]
    joined = results.concat(parts, "step", [2, 3])
    assert joined["attribution"].dims == ("step", "example", "row")
    assert "row" in results.DIMS


# --- which parts are counted ------------------------------------------------------------------------------


class Partly(nn.Module):
    """A measure of it need not read `side`, and a loss need not reach it; `count` is no number to train."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = nn.Linear(5, 3), nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.count = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x):
        return self.main(x) * self.frozen + 0 * self.count


@methods
def test_what_the_measure_does_not_read_or_the_step_does_not_move_counts_as_zero(method):
    model = Partly().double()
    model.count = nn.Parameter(torch.arange(3), requires_grad=False)

    def loss(model, batch):
        return classifier_loss(model, batch) + model.side(batch[0]).square().mean()

    recipe = classifier_recipe(model=model, loss=loss)
    patched = [*sites.parameters(model), sites.everything(model)]
    for recipe_loss in (loss, classifier_loss):
        recipe = classifier_recipe(model=model, loss=recipe_loss)
        found = dy.attribute_step(recipe, None, PAIRS[:1], patched, margin, method)["attribution"][0]
        assert [float(found.sel(site=n)) for n in ("side.weight", "side.bias", "frozen", "count")] == [
            0.0
        ] * 4
        assert abs(found.sel(site="main.weight")) > 1e-6
        main = float(found.sel(site="main.weight") + found.sel(site="main.bias"))
        assert float(found.sel(site="everything")) == pytest.approx(main, abs=1e-15)


def test_a_tied_tensor_is_counted_once_with_both_its_uses():
    model = tied()
    recipe = classifier_recipe(model=model, loss=lambda m, b: classifier_loss(m, (b[0], b[1])))
    batches = [(b.tokens[:, 0], b.targets) for b in map(tokens, range(4))]
    assert isinstance(model, Tied)
    pair = dy.Contrast(*batches[:3])
    patched = sites.parameters(model)
    assert [list(site.covers) for site in patched] == [["embed.weight"], ["mix.weight"], ["mix.bias"]]

    def right(model, batch):
        return model(batch[0]).gather(-1, batch[1][:, None]).squeeze(-1)

    found = dy.attribute_step(recipe, None, [pair], patched, right, tolerance=1e-10)
    assert abs(found["residual"]).item() < 1e-8
    assert abs(found["attribution"]).min() > 1e-6


def test_neurons_and_rows_divide_up_the_parameters_they_are_of():
    recipe = transformer_recipe()
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last
    pair = dy.Contrast(tokens(2), tokens(3), tokens(4))
    fine = [*neurons(recipe.model), *rows(recipe.model, "embed.W_E"), *rows(recipe.model, "unembed.b_U")]
    mlp = {f"mlp {n}": [f"blocks.{n}.mlp.{part}" for part in ("W_in", "b_in", "W_out")] for n in range(2)}
    whole = sites.matching(recipe.model, {**mlp, "W_E": "embed.W_E", "b_U": "unembed.b_U"})
    found = dy.attribute_step(recipe, checkpoint, [pair], [*fine, *whole], dy.measures.correct_logit).isel(
        example=0
    )
    values = found["attribution"]
    for layer in range(2):
        parts = values[((found["level"] == "neurons") & (found["layer"] == layer)).values]
        assert parts["neuron"].values.tolist() == list(range(12))
        assert parts.sum().item() == pytest.approx(values.sel(site=f"mlp {layer}").item(), abs=1e-14)
    for label, name, n in (("W_E", "embed.W_E", 11), ("b_U", "unembed.b_U", 11)):
        parts = values[(found["component"] == name).values]
        assert parts["index"].values.tolist() == list(range(n))
        assert parts.sum().item() == pytest.approx(values.sel(site=label).item(), abs=1e-14)
    exchanged = dy.patch_updates(recipe, checkpoint, [pair], fine, dy.measures.correct_logit)
    assert np.corrcoef(exchanged["effect"][0], values[: len(fine)])[0, 1] > 0.95


def test_a_model_without_neurons_or_such_a_parameter_says_what_it_has():
    with pytest.raises(SiteError, match=r"blocks\.0\.mlp\.W_in"):
        neurons(classifier())
    with pytest.raises(SiteError, match=r"blocks\.0\.mlp\.W_in"):
        neurons(transformer(attn_only=True))
    for name in ("encoder", "temperature"):
        with pytest.raises(SiteError, match=r"no parameter .* with rows; it has .*encoder\.weight"):
            rows(classifier(), name)


def test_places_named_twice_or_from_either_end_are_counted_once(setting):
    recipe, checkpoint, _ = setting
    patched = [
        Site("once", {"encoder.weight": (torch.tensor([1, 7]),)}),
        Site("twice", {"encoder.weight": (torch.tensor([-1, 1, 7, 1, -7]),)}),
    ]
    once, twice = dy.attribute_step(recipe, checkpoint, PAIRS[:1], patched, margin)["attribution"].values[0]
    assert once == twice != 0


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrasts": []}, "given no contrasts"),
        ({"sites": []}, "given no sites"),
        ({"method": "second_order"}, "'second_order'; expected one of first_order, integrated"),
        ({"tolerance": -1.0}, "tolerance -1.0"),
        ({"tolerance": float("nan")}, "tolerance nan"),
        ({"max_nodes": 0}, "max_nodes 0"),
        ({"sites": [Site("a", {"nowhere": ...})]}, "'nowhere'"),
        ({"sites": [Site("a", {"head.bias": ...}, positions=(1,))]}, "'a' means some positions"),
        ({"measure": lambda m, b: (m(b[0]).argmax(-1) == b[1]).float()}, "has no gradient"),
        ({"measure": torch.no_grad()(margin)}, "'margin' has no gradient"),
        ({"measure": lambda m, b: margin(m, b).sum().item()}, "has no gradient"),
    ],
)
def test_what_cannot_be_attributed_is_refused(changes, message, setting):
    arguments = {"contrasts": PAIRS, "sites": setting[2], "measure": margin, **changes}
    with pytest.raises(ValueError, match=message):
        dy.attribute_step(*setting[:2], **arguments)


def test_a_measure_without_a_finite_gradient_names_the_contrast_and_the_parameter(setting):
    def rooted(model, batch):
        return (margin(model, batch) * 0).sqrt()

    with pytest.raises(NonFiniteGradient, match=r"'rooted' of second at temperature is not finite"):
        dy.attribute_step(*setting[:2], PAIRS[1:], setting[2], rooted)
