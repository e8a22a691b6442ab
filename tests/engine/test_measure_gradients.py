"""Gradients of a measure at several models: at once what they are one by one."""

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics.engine.measure_gradients import MeasureGradients, MeasureQuery
from dynamics.steps import NonFiniteGradient
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.states import starting_point
from tests.zoo.small_models import classifier_recipe, points, tokens, transformer, transformer_recipe

WEIGHTS = (0.5, -1.5, 0.25)


def at_several(recipe, n=3):
    """A state, its buffers, and trained parameters of n models near it."""
    state = starting_point(recipe, None)
    generator = torch.Generator().manual_seed(0)
    leaves = {
        name: torch.stack(
            [p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for _ in range(n)]
        )
        for name, p in state.parameters.items()
    }
    return state, dict(state.buffers), leaves


def by_hand(recipe, others, leaves, weights, measure, probe):
    """The model's own parameters overwritten, and a plain backward pass."""
    total = {name: torch.zeros_like(leaf[0]) for name, leaf in leaves.items()}
    recipe.model.eval()
    for i, weight in enumerate(weights):
        recipe.model.load_state_dict({**others, **{name: leaf[i] for name, leaf in leaves.items()}})
        parameters = dict(recipe.model.named_parameters())
        value = torch.as_tensor(measure(recipe.model, probe)).mean() * weight
        for name, g in zip(parameters, torch.autograd.grad(value, parameters.values()), strict=True):
            total[name] += g
    return total


def counting(recipe):
    calls = []
    recipe.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def slopes_of(recipe, measure, probe, weights=WEIGHTS):
    state, others, leaves = at_several(recipe, len(weights))
    slopes = MeasureGradients(recipe, state)
    found = slopes.summed(MeasureQuery("m", measure, probe, others, "a test"), leaves, weights)
    calls = counting(recipe)
    again = slopes.summed(MeasureQuery("m", measure, probe, others, "a test"), leaves, weights)
    n_calls = len(calls)
    assert all(torch.equal(again[name], g) for name, g in found.items())
    return found, by_hand(recipe, others, leaves, weights, measure, probe), n_calls


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert float((found[name] - g).abs().max()) <= 1e-12 * max(1.0, float(g.abs().max())), name


def test_gradients_of_a_transformer_are_taken_at_once():
    found, expected, n_calls = slopes_of(transformer_recipe(), dy.measures.correct_log_prob, tokens(1))
    assert_alike(found, expected)
    assert n_calls == 1


def test_gradients_of_a_users_function_are_taken_at_once():
    def measure(model, batch):
        return dy.measures.correct_log_prob(model, batch)

    found, expected, n_calls = slopes_of(transformer_recipe(), measure, tokens(1))
    assert_alike(found, expected)
    assert n_calls == 1


def test_a_users_function_that_keeps_what_it_sees_is_called_once_for_each_model():
    seen = []

    def measure(model, batch):
        seen.append(dy.measures.correct_log_prob(model, batch))
        return seen[-1]

    found, expected, n_calls = slopes_of(transformer_recipe(), measure, tokens(1))
    assert n_calls == len(WEIGHTS)
    assert len(seen) == 3 * len(WEIGHTS)
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in seen)
    assert_alike(found, expected)


class Odd(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inner, self.how = transformer(), how

    def forward(self, ids):
        logits = self.inner(ids)
        if self.how == "branches on a value":
            return logits * (2.0 if logits.sum() > -1e9 else 1.0)
        if self.how == "calls .item()":
            return logits * (1.0 + 0 * logits.mean().item())
        return logits * (2.0 if torch._C._functorch.is_batchedtensor(self.inner.unembed.W_U) else 1.0)


@pytest.mark.parametrize("how", ["branches on a value", "calls .item()", "does otherwise under vmap"])
def test_a_model_that_vmap_does_not_take_gives_the_same_one_by_one(how):
    found, expected, n_calls = slopes_of(
        transformer_recipe(model=Odd(how)), dy.measures.correct_logit, tokens(1)
    )
    assert_alike(found, expected)
    assert n_calls == len(WEIGHTS)


def test_one_model_by_itself_is_not_taken_both_ways():
    found, expected, n_calls = slopes_of(transformer_recipe(), dy.measures.correct_logit, tokens(1), (1.0,))
    assert_alike(found, expected)
    assert n_calls == 1


def test_what_a_measure_does_not_read_has_no_gradient():
    recipe = classifier_recipe()
    state, others, leaves = at_several(recipe)
    asked = MeasureQuery(
        "m", lambda model, batch: model.encoder(batch[0]).mean(), points(0), others, "a test"
    )
    found = MeasureGradients(recipe, state).summed(asked, leaves, WEIGHTS)
    assert sorted(found) == ["encoder.bias", "encoder.weight"]


@pytest.mark.parametrize("n", [1, 3])
def test_a_gradient_that_is_not_finite_is_named(n):
    recipe = transformer_recipe()
    state, others, leaves = at_several(recipe, n)
    leaves["unembed.b_U"][-1, 3] = float("nan")
    asked = MeasureQuery("m", dy.measures.correct_log_prob, tokens(1), others, "a test")
    with pytest.raises(NonFiniteGradient, match=r"measure 'm' of a test at \S+ is not finite"):
        MeasureGradients(recipe, state).summed(asked, leaves, WEIGHTS[:n])


def test_leaves_are_left_as_they_are():
    recipe = transformer_recipe()
    state, others, leaves = at_several(recipe)
    before = {name: leaf.clone() for name, leaf in leaves.items()}
    asked = MeasureQuery("m", dy.measures.correct_logit, tokens(1), others, "a test")
    MeasureGradients(recipe, state).summed(asked, leaves, WEIGHTS)
    assert all(torch.equal(leaf, before[name]) and not leaf.requires_grad for name, leaf in leaves.items())


def test_a_users_function_may_write_into_the_parameters_it_is_given():
    def measure(model, batch):
        logits = dy.measures.correct_logit(model, batch)
        model.unembed.b_U.fill_(1e9)
        return logits

    recipe = transformer_recipe()
    state, others, leaves = at_several(recipe)
    before = {name: leaf.clone() for name, leaf in leaves.items()}
    asked = [MeasureQuery("m", m, tokens(1), others, "a test") for m in (measure, dy.measures.correct_logit)]
    found, expected = (MeasureGradients(recipe, state).summed(a, leaves, WEIGHTS) for a in asked)
    assert_alike(found, expected)
    assert all(torch.equal(leaf, before[name]) for name, leaf in leaves.items())


@pytest.mark.parametrize("n", [1, 3])
def test_a_finite_gradient_whose_norm_overflows_is_finite(n):
    recipe = transformer_recipe(model=transformer("float32"))
    state, others, leaves = at_several(recipe, n)
    huge = dy.measures.LogitMeasure(
        "huge", "logit", lambda z, batch: z.gather(-1, batch.targets[:, None]).squeeze(-1) * 1e25
    )
    asked = MeasureQuery("m", huge, tokens(1), others, "a test")
    found = MeasureGradients(recipe, state).summed(asked, leaves, WEIGHTS[:n])
    assert max(float(g.abs().max()) for g in found.values()) > 1e20
    assert all(bool(g.isfinite().all()) for g in found.values())


# --- several probes ---------------------------------------------------------------------------------------

PROBES = [tokens(seed) for seed in range(4)] + [tokens(9, rows=3)]


def of_probes(recipe, measure=dy.measures.correct_logit, probes=PROBES, paths=None):
    state, others, leaves = at_several(recipe, 1)
    leaves = {name: leaf[0] for name, leaf in leaves.items()}
    gradients = MeasureGradients(recipe, state, paths or ComputePaths("a test"))
    queries = [MeasureQuery("m", measure, probe, others, "a test") for probe in probes]
    values, found = gradients.of_probes(queries, leaves)
    for i, probe in enumerate(probes):
        expected = by_hand(
            recipe, others, {n: leaf[None] for n, leaf in leaves.items()}, (1.0,), measure, probe
        )
        assert_alike({name: g[i] for name, g in found.items()}, expected)
        with torch.no_grad():
            assert float(values[i]) == pytest.approx(float(measure(recipe.model, probe).mean()), abs=1e-12)
    return gradients.paths.facts()["gradients of the measure"]


def test_probes_of_one_shape_are_taken_at_once_and_each_is_what_it_is_alone():
    assert of_probes(transformer_recipe()) == "vmap over probes"
    own = lambda m, b: dy.measures.correct_logit(m, b)  # noqa: E731
    assert of_probes(transformer_recipe(), own) == "vmap over probes"


class OddTokens(Odd):
    def forward(self, ids):
        return self.inner(ids) * (2.0 if torch._C._functorch.is_gradtrackingtensor(ids) else 1.0)


@pytest.mark.parametrize(
    "model",
    [Odd("branches on a value"), Odd("calls .item()"), OddTokens("does otherwise")],
    ids=lambda m: m.how,
)
def test_probes_of_a_model_that_vmap_does_not_take_are_taken_one_by_one(model):
    assert of_probes(transformer_recipe(model=model)).startswith("one model at a time")


def test_where_memory_runs_out_fewer_probes_are_taken_at_a_time(monkeypatch):
    over = MeasureGradients._over_probes

    def two_at_most(self, queries, leaves):
        if len(queries) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return over(self, queries, leaves)

    monkeypatch.setattr(MeasureGradients, "_over_probes", two_at_most)
    assert "fewer at a time" in of_probes(transformer_recipe(), probes=PROBES[:4] * 2)


def test_a_parameter_that_no_probe_reads_has_gradient_zero():
    recipe = classifier_recipe()
    state, others, leaves = at_several(recipe, 1)
    leaves = {name: leaf[0] for name, leaf in leaves.items()}
    asked = [
        MeasureQuery("m", lambda model, batch: model.encoder(batch[0]).mean(), points(i), others, "a test")
        for i in range(2)
    ]
    _, found = MeasureGradients(recipe, state).of_probes(asked, leaves)
    assert not found["head.weight"].any()
    assert all(found["encoder.weight"][i].any() for i in range(2))
