"""What a user's measure writes into is seen and put back, so that it is called as often as without vmap."""

import json
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynamics as dy
from dynamics.engine import side_effects
from dynamics.engine.side_effects import nothing_written
from dynamics.steps.fallbacks import Fallback
from tests.zoo.small_models import classifier, classifier_recipe, points

SEEN = []
CALLS = 0


def margin(model, batch):
    x, y = batch[:2]
    return model(x).gather(1, y[:, None])[:, 0]


def to_a_global_list(model, batch):
    SEEN.append(margin(model, batch))
    return SEEN[-1]


def to_a_global_number(model, batch):
    global CALLS
    CALLS += 1
    return margin(model, batch)


class Metric:
    """A measure with a state of its own, as metrics have it."""

    kept_by_all: ClassVar = []

    def __init__(self, how):
        self.how, self.total, self.values, self.by_key = how, torch.zeros(()), [], {"inner": {}}
        self.counts_of_calls = np.zeros(2)

    def __call__(self, model, batch):
        found = margin(model, batch)
        getattr(self, self.how)(found)
        return found

    def counts(self, found):
        self.total += 1

    def counts_in_an_array(self, found):
        self.counts_of_calls[1] += 1

    def rebinds(self, found):
        self.total = self.total + found.detach().mean()

    def appends(self, found):
        self.values.append(found)

    def nests(self, found):
        self.by_key["inner"][len(self.by_key["inner"])] = found

    def shares(self, found):
        self.kept_by_all.append(found)

    def seen(self):
        """A copy of everything it keeps."""
        kept = (self.values, self.kept_by_all, list(self.by_key["inner"].values()))
        return (
            float(self.total),
            self.counts_of_calls.tolist(),
            [[float(v.mean()) for v in values] for values in kept],
        )


def closing_over():
    kept, n = [], 0

    def inside(values):
        kept.append(values)

    def measure(model, batch):
        nonlocal n
        n += 1
        inside(margin(model, batch))
        return kept[-1]

    return measure, lambda: (n, [float(v.mean()) for v in kept])


def writers():
    yield "a global list", to_a_global_list, lambda: [float(v.mean()) for v in SEEN]
    yield "a global number", to_a_global_number, lambda: CALLS
    yield ("a closure", *closing_over())
    for how in ("counts", "counts_in_an_array", "rebinds", "appends", "nests", "shares"):
        metric = Metric(how)
        yield how, metric, metric.seen
    metric = Metric("appends")
    yield "a method", metric.__call__, metric.seen
    metric = Metric("appends")
    yield "a partial", partial(lambda model, batch, kept: kept(model, batch), kept=metric), metric.seen


WRITERS = {name: (measure, seen) for name, measure, seen in writers()}


def models(n=3):
    recipe = classifier_recipe()
    generator = torch.Generator().manual_seed(0)
    stacked = {
        name: p.detach() + torch.randn(n, *p.shape, generator=generator, dtype=p.dtype)
        for name, p in recipe.model.named_parameters()
    }
    return recipe.model, stacked


def called_at_once(model, stacked, measure, batch):
    with torch.no_grad(), nothing_written(model, [measure], batch, stacked.values()):
        return torch.vmap(
            lambda own: torch.func.functional_call(_Calling(model, measure), own, (batch,)), randomness="same"
        )({f"model.{name}": t for name, t in stacked.items()})


class _Calling(nn.Module):
    def __init__(self, model, measure):
        super().__init__()
        self.model, self.measure = model, measure

    def forward(self, batch):
        return self.measure(self.model, batch)


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_measure_writes_is_seen_and_put_back(name):
    measure, seen = WRITERS[name]
    model, stacked = models()
    with torch.no_grad():
        measure(model, points(0))  # something to lose
    before = seen()
    with pytest.raises(Fallback, match="a measure writes into"):
        called_at_once(model, stacked, measure, points(1))
    assert seen() == before


@pytest.mark.parametrize("name", WRITERS)
def test_it_writes_as_often_and_the_same_as_under_a_loop(name):
    measure, seen = WRITERS[name]
    recipe = classifier_recipe()
    chosen, pair = dy.sites.parameters(recipe.model)[:3], dy.Contrast(points(1), points(2), points(3))
    for each in (SEEN, Metric.kept_by_all):
        each.clear()
    found = dy.patch_updates(recipe, None, [pair], chosen, margin)
    n_before = seen()
    slow = dy.patch_updates(recipe, None, [pair], chosen, measure)
    said = json.loads(slow.attrs["provenance"])["paths"]["measures"]
    assert said.startswith("one model at a time, since a measure writes into ")
    assert seen() != n_before
    np.testing.assert_allclose(slow["patched"], found["patched"], rtol=0, atol=1e-12)
    if name == "a global list":
        assert [float(v.mean()) for v in SEEN[:4]] == [
            slow[reference].item() for reference in ("untouched", "coasted", "base", "source")
        ]


class Holder:
    """A batch that torch does not know as a tree."""

    def __init__(self):
        self.x, self.y = points(0)
        self.logits = None
        self.notes = {}


def keeps_logits(model, batch):
    batch.logits = model(batch.x)
    return batch.logits.mean(1)


def scales_in_place(model, batch):
    batch.x.mul_(2.0)
    return model(batch.x).mean(1)


def notes(model, batch):
    batch.notes["mean"] = model(batch.x).mean()
    return model(batch.x).mean(1)


@pytest.mark.parametrize("measure", [keeps_logits, scales_in_place, notes])
def test_a_batch_that_is_written_into_is_what_it_was(measure):
    model, stacked = models()
    batch = Holder()
    x = batch.x.clone()
    with pytest.raises(Fallback, match="a measure writes into"):
        called_at_once(model, stacked, measure, batch)
    assert torch.equal(batch.x, x)
    assert batch.logits is None
    assert batch.notes == {}


def test_parameters_that_are_written_into_are_seen():
    def ablates(model, batch):
        model.head.weight.mul_(0)
        return margin(model, batch)

    model, stacked = models()
    with pytest.raises(Fallback, match="the parameters"):
        called_at_once(model, stacked, ablates, points(1))


class Noting(nn.Module):
    """A model whose forward pass keeps what it computes."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = classifier(), "nothing yet"

    def forward(self, x):
        self.last = self.inner(x)
        return self.last


def test_what_a_forward_pass_keeps_on_the_model_is_put_back_and_no_reason_against_vmap():
    def from_attribute(model, batch):
        model(batch[0])
        return model.last.mean(1)

    recipe = classifier_recipe(model=Noting())
    pair = dy.Contrast(points(1), points(2), points(3))
    chosen = dy.sites.parameters(recipe.model)
    found = dy.patch_updates(recipe, None, [pair], chosen, from_attribute)
    assert json.loads(found.attrs["provenance"])["paths"]["measures"] == "vmap over models"
    assert not torch._C._functorch.is_functorch_wrapped_tensor(recipe.model.last)
    slow = dy.patch_updates(recipe, None, [pair], chosen, lambda m, b: float(from_attribute(m, b).mean()))
    np.testing.assert_allclose(found["patched"], slow["patched"], rtol=0, atol=1e-12)


def test_a_cache_that_the_first_call_fills_is_no_reason_against_vmap():
    known = {}

    def measure(model, batch):
        if "rows" not in known:
            known["rows"] = torch.arange(len(batch[1]))
        return model(batch[0])[known["rows"], batch[1]]

    recipe = classifier_recipe()
    pair = dy.Contrast(points(1), points(2), points(3))
    found = dy.patch_updates(recipe, None, [pair], dy.sites.parameters(recipe.model), measure)
    assert json.loads(found.attrs["provenance"])["paths"]["measures"] == "vmap over models"
    assert list(known) == ["rows"]


def test_a_function_that_reaches_too_much_is_not_called_at_once(monkeypatch):
    monkeypatch.setattr(side_effects, "MOST_REACHED", 20)
    many = [[i] for i in range(50)]
    model, stacked = models()
    with pytest.raises(Fallback, match="reaches more than 20 objects"):
        called_at_once(model, stacked, lambda m, b: margin(m, b) * len(many), points(1))


def test_large_tensors_are_not_copied_and_a_write_is_seen(monkeypatch):
    monkeypatch.setattr(side_effects, "KEPT_BYTES", 8)
    large = torch.zeros(4, dtype=torch.float64)

    def counts(model, batch):
        large.add_(1)
        return margin(model, batch)

    model, stacked = models()
    with pytest.raises(Fallback, match="a tensor that it reaches"):
        called_at_once(model, stacked, counts, points(1))


# --- measures of every kind -------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """Several outputs, as a dict or as a tuple."""

    def __init__(self, as_dict):
        super().__init__()
        self.body, self.classes, self.value = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 1)
        self.as_dict = as_dict

    def forward(self, x):
        hidden = self.body(x).tanh()
        outputs = {"logits": self.classes(hidden), "value": self.value(hidden)[:, 0]}
        return outputs if self.as_dict else tuple(outputs.values())


def of_dict(model, batch):
    found = model(batch[0])
    return F.cross_entropy(found["logits"], batch[1], reduction="none") + found["value"] ** 2


def of_tuple(model, batch):
    logits, value = model(batch[0])
    return {"both": logits.softmax(-1)[:, 0] * value}["both"]


def squared_error(model, batch):
    return F.mse_loss(model(batch[0])["value"], batch[1].double())


def accuracy(model, batch):
    return (model(batch[0])["logits"].argmax(-1) == batch[1]).double()


MEASURES = {
    "classification": (True, {"loss": of_dict, "accuracy": accuracy}),
    "regression": (True, squared_error),
    "tuple": (False, of_tuple),
}


def mixed_loss(model, batch):
    found = model(batch[0])
    logits, value = found.values() if isinstance(found, dict) else found
    return F.cross_entropy(logits, batch[1]) + value.square().mean()


@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates, dy.attribute_step])
@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_any_output_are_taken_at_once_and_are_what_they_are_one_by_one(name, verb):
    as_dict, measure = MEASURES[name]
    if verb is dy.attribute_step and name == "classification":
        measure = of_dict
    torch.manual_seed(0)
    recipe = classifier_recipe(model=TwoHeads(as_dict).double(), loss=mixed_loss)
    pairs = [dy.Contrast(points(1), points(2), points(3))]
    chosen = dy.sites.parameters(recipe.model)
    found = verb(recipe, None, pairs, chosen, measure)

    kept = []

    def alone(function):
        def measured(model, batch):
            kept.append(1)
            return function(model, batch)

        return measured

    slow_measure = {n: alone(f) for n, f in measure.items()} if isinstance(measure, dict) else alone(measure)
    slow = verb(recipe, None, pairs, chosen, slow_measure)
    part = "gradients of the measure" if verb is dy.attribute_step else "measures"
    assert json.loads(found.attrs["provenance"])["paths"][part].startswith("vmap over")
    assert json.loads(slow.attrs["provenance"])["paths"][part].startswith("one model at a time, since ")
    for variable in found.data_vars:
        np.testing.assert_allclose(found[variable], slow[variable], rtol=0, atol=1e-12)
