"""attribute_parameters: complete, down to single rows, and what a slow sum along the line finds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import dynamics as dy
from checkpoints import Checkpoint, CheckpointPair
from dynamics.sites import Site, SiteError
from tests.zoo.pair_models import MODELS, batch_for, loaded, measure_for, mixer, pair_of
from tests.zoo.small_models import classifier, margin, points, tokens, transformer


def partition(name, model):
    return dy.sites.matrices(model) if name in ("toy", "gpt2", "llama") else dy.sites.parameters(model)


@pytest.mark.parametrize("name", MODELS)
def test_over_a_partition_attributions_add_up_to_the_change_between_the_checkpoints(name):
    model = MODELS[name]()
    measure = {"it": measure_for(name)} if name == "mlp" else dy.measures.correct_logit
    batches = [batch_for(name, 1), batch_for(name, 2)]
    contrasts = [dy.Contrast(batches[0]), dy.Contrast(None, None, batches[1])]
    recipe, pair, chosen = dy.Recipe(model), pair_of(model, scale=0.05), partition(name, model)
    found = dy.attribute_parameters(recipe, pair, contrasts, chosen, measure, tolerance=1e-7)
    whole = dy.patch_parameters(recipe, pair, contrasts, chosen[:1], measure)
    for reference in ("base", "source"):
        np.testing.assert_allclose(found[reference], whole[reference], rtol=0, atol=1e-12)
    gap = found["source"] - found["base"]
    np.testing.assert_allclose(found["attribution"].sum("site") - gap, found["residual"], rtol=0, atol=1e-13)
    size = 1e-4 if name == "llama" else 1e-6  # whose norms compute in single precision
    assert (abs(found["residual"]) < size * abs(found["attribution"]).sum("site")).all()
    assert abs(gap).min() > 1e-3


@pytest.mark.parametrize("method", ["first_order", "integrated"])
def test_a_site_is_a_slow_sum_of_gradients_along_the_line(method):
    model = mixer()
    pair, batch = pair_of(model), tokens(1)
    chosen = [*dy.sites.parameters(model), Site("part", {"up.weight": (2,), "norm.bias": (slice(0, 3),)})]
    found = dy.attribute_parameters(
        dy.Recipe(model), pair, [dy.Contrast(batch)], chosen, dy.measures.correct_logit, method, 1e-12
    )
    nodes = np.linspace(0, 1, 401) if method == "integrated" else np.zeros(1)
    slow = {site.label: [] for site in chosen}
    for node in nodes.tolist():
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for n, p in twin.named_parameters():
                p.copy_(torch.lerp(pair.base.parameters[n], pair.source.parameters[n], node))
        dy.measures.correct_logit(twin, batch).mean().backward()
        for site in chosen:
            shares = {
                n: twin.get_parameter(n).grad * (pair.source.parameters[n] - pair.base.parameters[n])
                for n in site.covers
            }
            slow[site.label].append(sum(float(shares[n][index].sum()) for n, index in site.covers.items()))
    for label, values in slow.items():
        expected = np.trapezoid(values, nodes) if method == "integrated" else values[0]
        assert found["attribution"].sel(site=label).item() == pytest.approx(expected, abs=1e-4)
    assert (found["nodes"].item() == 1) == (method == "first_order")


def test_rows_of_an_embedding_and_neurons_add_up_to_what_they_are_parts_of():
    model = transformer()
    rows, neurons = dy.sites.rows(model, "embed.W_E"), dy.sites.neurons(model)
    wholes = [Site("W_E", {"embed.W_E": ...}), Site("MLPs", {n: ... for s in neurons for n in s.covers})]
    found = dy.attribute_parameters(
        dy.Recipe(model),
        pair_of(model),
        [dy.Contrast(tokens(1))],
        [*rows, *neurons, *wholes],
        dy.measures.correct_logit,
    )["attribution"][0]
    parts = found.values[: len(rows)].sum(), found.values[len(rows) : -2].sum()
    np.testing.assert_allclose(parts, found.values[-2:], rtol=0, atol=1e-12)
    absent = sorted(set(range(11)) - set(tokens(1).tokens.flatten().tolist()))
    assert (found.values[absent] == 0).all()


def test_a_pair_of_one_checkpoint_has_exactly_nothing_to_attribute():
    model = transformer()
    same = pair_of(model).source
    chosen = dy.sites.matrices(model)
    found = dy.attribute_parameters(
        dy.Recipe(model),
        CheckpointPair(same, same),
        [dy.Contrast(tokens(1))],
        chosen,
        dy.measures.correct_logit,
    )
    assert (found["attribution"] == 0).all()
    assert (found["residual"] == 0).all()


def test_the_reversed_pair_has_the_negative_attributions():
    model = transformer()
    pair, chosen, contrasts = pair_of(model), dy.sites.matrices(model), [dy.Contrast(tokens(1))]
    there, back = (
        dy.attribute_parameters(
            dy.Recipe(model), p, contrasts, chosen, dy.measures.correct_logit, max_nodes=8
        )
        for p in (pair, pair.reversed())
    )
    np.testing.assert_allclose(there["attribution"], -back["attribution"], rtol=0, atol=1e-13)


def test_parameters_that_do_not_train_are_moved_too():
    model = mixer()
    pair, chosen = pair_of(model), dy.sites.parameters(model)
    arguments = pair, [dy.Contrast(tokens(1))], chosen, dy.measures.correct_logit
    free = dy.attribute_parameters(dy.Recipe(model), *arguments)
    model.up.requires_grad_(False)
    frozen = dy.attribute_parameters(dy.Recipe(model), *arguments)
    assert free["attribution"].equals(frozen["attribution"])


def test_what_buffers_do_is_left_in_the_residual():
    model = classifier(norm=True)
    pair = pair_of(model)
    with torch.no_grad():
        pair.source.buffers["norm.running_mean"].add_(1.0)
    found = dy.attribute_parameters(
        dy.Recipe(model), pair, [dy.Contrast(points(1))], dy.sites.parameters(model), margin, tolerance=1e-9
    )
    hybrid = loaded(model, pair.source)
    hybrid.load_state_dict(hybrid.state_dict() | pair.base.buffers)
    with torch.no_grad():
        missing = float(
            margin(loaded(model, pair.source), points(1)).mean() - margin(hybrid, points(1)).mean()
        )
    assert found["residual"].item() == pytest.approx(-missing, abs=1e-8)
    assert abs(missing) > 1e-2
    assert found["nodes"].item() < 64  # the tolerance asks for the parameters' share alone


def test_positions_and_single_checkpoints_are_refused():
    model = mixer()
    (placed,) = dy.sites.at_positions(dy.sites.parameters(model)[:1], {"first": 0})
    arguments = [dy.Contrast(tokens(1))], [placed], dy.measures.correct_logit
    with pytest.raises(SiteError, match=r"attribute_parameters cannot exchange.* or use patch_parameters"):
        dy.attribute_parameters(dy.Recipe(model), pair_of(model), *arguments)
    with pytest.raises(TypeError, match="takes a pair of checkpoints second and was given a Checkpoint"):
        dy.attribute_parameters(dy.Recipe(model), Checkpoint.capture(model), *arguments)
