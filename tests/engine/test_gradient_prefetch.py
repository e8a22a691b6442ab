"""Gradients of many batches by one vmap(grad): they are those of a pass each, and that way is taken."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import dynamics as dy
from checkpoints.values import differences
from dynamics import sites
from dynamics.batch import Batch
from dynamics.engine import gradient_prefetch
from dynamics.recipe import Contrast
from dynamics.steps import NonFiniteGradient, gradient
from dynamics.steps.fallbacks import ComputePaths, Fallback
from dynamics.steps.per_example import signature, vmapped_gradients
from dynamics.steps.states import starting_point
from tests.oracles.windows_by_hand import counted
from tests.zoo import signal_models
from tests.zoo.any_models import KINDS, made
from tests.zoo.cases import first_quick
from tests.zoo.signal_models import RECIPES, batch_of, begun, tolerance_of
from tests.zoo.small_models import classifier_recipe, margin, points, tokens, trained, transformer_recipe

LOOPED = {"LSTM", "GRU", "LSTM with dropout", "spectral norm", "sparse", "transformer layer"}
"""Those vmap cannot take, and one whose dropout it draws otherwise."""


def refusing(told):
    """vmapped_gradients that says what it was given and takes nothing."""

    def refuse(*given):
        told(given)
        raise Fallback("not here")

    return refuse


def case(name):
    """A recipe, a checkpoint, five batches of one shape, and how exact arithmetic is."""
    if name in KINDS and name not in RECIPES:
        recipe, live = made(name)
        seeds = range(10, 20, 2)  # of a module with two ways, one way
        return recipe, live.last, [KINDS[name].batch(seed) for seed in seeds], KINDS[name].tolerance
    recipe = RECIPES[name]()
    return recipe, begun(recipe, name).last, [batch_of(name, seed) for seed in range(5)], tolerance_of(name)


@pytest.mark.parametrize("name", [*RECIPES, *(kind for kind in KINDS if kind not in RECIPES)])
def test_gradients_taken_at_once_are_those_of_a_pass_each(name):
    recipe, checkpoint, batches, tolerance = case(name)
    alone = [gradient(recipe, checkpoint, batch) for batch in batches]
    if name in LOOPED:
        with pytest.raises(Fallback):
            vmapped_gradients(recipe, checkpoint, batches, alone[0])
        return
    found = vmapped_gradients(recipe, checkpoint, batches, alone[0])
    assert len(found) == len(batches)
    for ours, theirs in zip(found, alone, strict=True):
        assert abs(float(ours.loss - theirs.loss)) <= tolerance * max(1, abs(float(theirs.loss)))
        assert not differences(vars(ours.rng), vars(theirs.rng))
        assert ours.buffers.keys() == theirs.buffers.keys()
        for of_ours, of_theirs in ((ours.gradients, theirs.gradients), (ours.buffers, theirs.buffers)):
            sizes = [float(g.double().abs().max()) for g in of_theirs.values() if g is not None]
            for key, g in of_theirs.items():
                if g is None:
                    assert of_ours[key] is None
                    continue
                assert of_ours[key].dtype == g.dtype
                assert float((of_ours[key].double() - g.double()).abs().max()) <= tolerance * max(sizes), key
    assert differences(found[0].gradients, found[1].gradients)


def test_elements_without_a_gradient_are_exactly_zero_at_once_too():
    """A fresh Adam makes a full step of any rounding."""
    recipe = transformer_recipe()
    state, batches = starting_point(recipe, None), [tokens(seed, below=10) for seed in range(3)]
    alone = [gradient(recipe, state, batch) for batch in batches]
    for ours, theirs in zip(vmapped_gradients(recipe, state, batches, alone[0]), alone, strict=True):
        unseen = theirs.gradients["embed.W_E"] == 0
        assert 0 < int(unseen.sum()) < unseen.numel()
        assert torch.equal(ours.gradients["embed.W_E"] == 0, unseen)


@pytest.fixture(scope="module")
def setting():
    recipe = classifier_recipe()
    checkpoint = trained(recipe, [points(seed) for seed in range(3)]).last
    contrasts = [
        dy.Contrast(points(2 * i), points(2 * i + 1), points(60 + i), {"alias": i}) for i in range(5)
    ]
    return recipe, checkpoint, contrasts, sites.parameters(recipe.model)


VERBS = {
    "patch_gradients": dy.patch_gradients,
    "patch_updates": dy.patch_updates,
    "attribute_step": dy.attribute_step,
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("n_bytes", [2**27, 2**14, 1])
def test_a_verb_finds_the_same_with_gradients_taken_one_by_one(verb, n_bytes, setting, monkeypatch):
    recipe, checkpoint, contrasts, patched = setting
    with dy.max_memory(n_bytes):
        ours = VERBS[verb](recipe, checkpoint, contrasts, patched, margin)
    taken = []
    monkeypatch.setattr(gradient_prefetch, "vmapped_gradients", refusing(taken.append))
    with dy.max_memory(4 * 4 * sum(p.nbytes for p in checkpoint.parameters.values())):
        theirs = VERBS[verb](recipe, checkpoint, contrasts, patched, margin)
    assert [len(given[2]) for given in taken] == [4]  # it is not tried again
    for name in theirs.data_vars:
        assert float(abs(ours[name] - theirs[name]).max()) <= 1e-12, name
    assert float(abs(theirs["source"] - theirs["base"]).max()) > 1e-3


def test_ten_batches_take_two_forward_passes(setting):
    recipe, calls = counted(setting[0])
    taker = gradient_prefetch.GradientPrefetch(recipe, setting[1], setting[2], ComputePaths())
    for contrast in setting[2]:
        assert taker.gradient(contrast.base, "base") is taker.gradient(contrast.base, "base")
        taker.gradient(contrast.source, "source")
    assert len(calls) == 2


def test_as_many_are_taken_at_once_as_the_memory_holds(setting):
    recipe, calls = counted(setting[0])
    model = sum(p.nbytes for p in setting[1].parameters.values())
    with dy.max_memory(4 * 4 * model):
        taker = gradient_prefetch.GradientPrefetch(recipe, setting[1], setting[2], ComputePaths())
        for contrast in setting[2]:
            taker.gradient(contrast.base, "base")
            taker.gradient(contrast.source, "source")
            assert len(taker._taken) in (0, 4)
    assert len(calls) == 2 + 2 + 2  # of 4, of 4, and two by themselves


def test_batches_of_other_shapes_are_taken_with_their_like(setting):
    recipe, calls = counted(setting[0])
    small = [(x[:3], y[:3]) for x, y in map(points, range(20, 26))]
    contrasts = [dy.Contrast(c.base, s) for c, s in zip(setting[2], small, strict=False)]
    taker = gradient_prefetch.GradientPrefetch(recipe, setting[1], contrasts, ComputePaths())
    for contrast in contrasts:
        for batch in (contrast.base, contrast.source):
            found, alone = taker.gradient(batch, "it"), gradient(recipe, setting[1], batch)
            for name, g in alone.gradients.items():
                assert float((found.gradients[name] - g).abs().max()) <= 1e-12
    assert len(calls) == 10 + 2 + 10  # the oracle's; the bases at once; then sources, base by base


def test_what_is_no_tensor_tells_batches_apart():
    x = torch.zeros(2)
    assert signature((x, "left")) == signature((x + 1, "left"))
    assert signature({"x": x, "n": None}) == signature({"x": x, "n": None})
    others = [
        ((x, "left"), (x, "right")),
        ((x, 1), (x, True)),
        ((x, 1), (x, 1.0)),
        ((x,), (x.double(),)),
        ((x,), (torch.zeros(3),)),
        ((x,), [x]),
        ((x, x.numpy()), (x, (x + 1).numpy())),
        (Batch(x, x, x), Batch(x, x, x, x)),
    ]
    for one, other in others:
        assert signature(one) != signature(other)


def test_what_vmap_finds_otherwise_is_not_taken(setting):
    """A loss that knows another model by name: to autograd its parameters are others, to vmap of no account."""
    recipe, checkpoint, contrasts, _ = setting
    calls = []

    def loss(model, batch):
        calls.append(1)
        return recipe.loss(model, batch) * (1 if len(calls) == 1 else 2)

    batches = [c.base for c in contrasts]
    fickle = dy.Recipe(recipe.model, loss, recipe.optimizer)
    alone = gradient(fickle, checkpoint, batches[0])
    with pytest.raises(Fallback, match="another gradient"):
        vmapped_gradients(fickle, checkpoint, batches, alone)
    assert len(vmapped_gradients(recipe, checkpoint, batches, alone)) == len(batches)


def test_a_loss_that_reads_a_number_is_taken_batch_by_batch(setting):
    recipe, checkpoint, contrasts, patched = setting
    seen = []

    def loss(model, batch):
        value = recipe.loss(model, batch)
        seen.append(value.item())
        return value

    found = dy.patch_gradients(
        dy.Recipe(recipe.model, loss, recipe.optimizer, clip=recipe.clip),
        checkpoint,
        contrasts,
        patched,
        margin,
    )
    expected = dy.patch_gradients(recipe, checkpoint, contrasts, patched, margin)
    assert float(abs(found["patched"] - expected["patched"]).max()) <= 1e-12
    assert len(seen) == 2 * len(contrasts)


def test_attributes_that_the_model_writes_are_those_of_a_pass_by_itself(setting):
    class Keeping(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.running, self.seen = inner, torch.zeros((), dtype=torch.float64), []

        def forward(self, x):
            out = self.inner(x)
            self.running = 0.9 * self.running + out.detach().mean()
            self.seen.append(out.detach())
            return out

    recipe, _, contrasts, _ = setting
    keeping = dy.Recipe(Keeping(recipe.model), recipe.loss, recipe.optimizer)
    state, batches = starting_point(keeping, None), [c.base for c in contrasts]
    alone = gradient(keeping, state, batches[0])
    running, seen = float(keeping.model.running), list(keeping.model.seen)
    assert len(vmapped_gradients(keeping, state, batches, alone)) == len(batches)
    assert float(keeping.model.running) == running != 0
    assert len(keeping.model.seen) == 1
    assert keeping.model.seen[0] is seen[0]


def test_a_gradient_that_is_not_finite_names_its_own_contrast(setting):
    recipe, checkpoint, contrasts, patched = setting
    spoilt = [replace(c, coords={"example": f"number {i}"}) for i, c in enumerate(contrasts)]
    x, y = spoilt[3].source
    spoilt[3] = replace(spoilt[3], source=(x * float("nan"), y))
    with pytest.raises(NonFiniteGradient, match="the source batch of number 3"):
        dy.patch_gradients(recipe, checkpoint, spoilt, patched, margin)


def test_a_batch_that_alone_writes_into_a_buffer_is_not_taken_with_others():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()
            self.register_buffer("largest", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            with torch.no_grad():
                self.largest.copy_(torch.maximum(self.largest, x.detach().max() - 3))
            return self.layer(x)

    recipe = classifier_recipe(model=Counting())
    state = starting_point(recipe, None)
    batches = [(x.clamp(-1, 1), y) for x, y in map(points, range(3))]
    batches[2] = (batches[2][0] + 5, batches[2][1])
    alone = [gradient(recipe, state, batch) for batch in batches]
    assert [float(step.buffers["largest"]) > 0 for step in alone] == [False, False, True]
    with pytest.raises(Fallback):
        vmapped_gradients(recipe, state, batches, alone[0])
    assert float(state.buffers["largest"]) == 0
    assert float(recipe.model.largest) == 0


@pytest.mark.parametrize("name", first_quick(signal_models.TOYS))
def test_rows_of_a_batch_are_taken_at_once(name, monkeypatch):
    recipe, checkpoint, batches, _ = case(name)
    probes = [Contrast(None, None, batches[1], {"example": "it"})]
    ours = dy.attribute_examples(recipe, checkpoint, batches[0], probes, dy.measures.correct_logit)
    taken = []
    monkeypatch.setattr(
        gradient_prefetch, "vmapped_gradients", refusing(lambda given: taken.append(len(given[2])))
    )
    theirs = dy.attribute_examples(recipe, checkpoint, batches[0], probes, dy.measures.correct_logit)
    assert taken == [len(batches[0])]
    assert float(abs(ours["attribution"] - theirs["attribution"]).max()) <= 1e-12
    assert float(abs(theirs["attribution"]).max()) > 1e-3
