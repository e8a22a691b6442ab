"""patch_signals, patch_factors, positions and dy.cache leave everything of the user's as it was."""

import contextlib
import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import dynamics as dy
from checkpoints.values import copied, differences
from dynamics import sites
from dynamics.sites import Site, SiteError
from tests.zoo.signal_models import ConvNet, Lstm, Mlp, images, made, toy_recipe
from tests.zoo.small_models import (
    OPTIMIZERS,
    classifier_loss,
    classifier_recipe,
    margin,
    points,
    tokens,
    trained,
)

pytestmark = pytest.mark.slow

HOOKS = [
    f"_{kind}{suffix}" for kind in ("forward_hooks", "forward_pre_hooks") for suffix in ("", "_with_kwargs")
] + ["_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks"]


class Broken(Exception):
    """Raised by a loss or a measure of the user's."""


def linear_parameters(model):
    wanted = [n for n, p in model.named_parameters() if n.rpartition(".")[0] and p.requires_grad]
    return [Site(n, {n: ...}) for n in wanted[:: 1 + len(wanted) // 8]]


def located(recipe, checkpoint, pair, measure):
    wanted = linear_parameters(recipe.model)
    return dy.patch_gradients(
        recipe, checkpoint, [pair], sites.at_positions(wanted, {"first": 0, "others": [1, 2]}), measure
    )


def signals(forward):
    def verb(recipe, checkpoint, pair, measure):
        names = [n for n in dy.cache(recipe, checkpoint, pair.base).signals if "[" not in n]
        patched = [Site(n, {n: ...}) for n in names]
        return dy.patch_signals(recipe, checkpoint, [pair, pair.reversed()], patched, measure, forward)

    return verb


def of_factors(recipe, checkpoint, pair, measure):
    patched = linear_parameters(recipe.model)
    return dy.patch_factors(recipe, checkpoint, [pair, pair.reversed()], patched, measure)


VERBS = {
    "signals": signals("base"),
    "signals and forward": signals("source"),
    "factors": of_factors,
    "positions": located,
    "cache": lambda recipe, checkpoint, pair, _: dy.cache(recipe, checkpoint, pair.base),
}
LOSSES = {
    "MLP": classifier_loss,
    "convolutions": classifier_loss,
    "LSTM": dy.measures.cross_entropy,
    "toy": dy.measures.cross_entropy,
}
UNPARAMETERISED = {"MLP": "drop", "convolutions": "pool", "toy": "blocks.1.hook_resid_mid"}


class Belongings:
    """A user's model in an unusual state, its optimizer, a checkpoint and a contrast, and what they were."""

    def __init__(self, name, optimizer="AdamW", breaks_at=None):
        calls = []

        def loss(model, batch):
            """Draws from every generator, and at some call breaks halfway, with everything attached."""
            value = LOSSES[name](model, batch)
            calls.append(batch)
            if len(calls) - 1 == breaks_at:
                raise Broken
            return value * (torch.rand(()).double() + random.random() + np.random.rand())  # noqa: NPY002

        model = {
            "MLP": lambda: made(lambda: Mlp(dropout=0.3)),
            "convolutions": lambda: made(ConvNet),
            "LSTM": lambda: made(Lstm),
            "toy": lambda: toy_recipe().model,
        }[name]()
        draw = {"MLP": points, "convolutions": images}.get(name, tokens)
        plain = dy.Recipe(model, LOSSES[name], OPTIMIZERS[optimizer])
        live = trained(plain, [draw(0), draw(1)])
        self.optimizer, self.checkpoint = live.optimizer, live.last
        self.recipe = replace(plain, loss=loss, clip=dy.ByNorm(0.1))
        self.pair = dy.Contrast(draw(10), draw(11), draw(12))
        self.measure = margin if LOSSES[name] is classifier_loss else dy.measures.correct_logit
        first, *_, last = model.parameters()
        last.grad = torch.ones_like(last)
        first.grad = torch.zeros_like(first)
        module = model.get_submodule(UNPARAMETERISED.get(name, ""))
        module.register_forward_hook(lambda module, inputs, output: None)
        module.register_forward_pre_hook(lambda module, inputs: None)
        if name in UNPARAMETERISED:
            module.register_full_backward_hook(lambda module, inputs, outputs: None)
        next(model.children()).eval()
        torch.manual_seed(3)
        self.before = copied(self.seen())

    def seen(self):
        model = self.recipe.model
        named = [*model.named_parameters(), *model.named_buffers()]
        version, words, gauss = random.getstate()
        legacy = np.random.get_state(legacy=False)  # noqa: NPY002
        batches = [self.pair.base, self.pair.source, self.pair.probe]
        return {
            "tensors": dict(named),
            "identities": [id(tensor) for _, tensor in named],
            "versions": [tensor._version for _, tensor in named],
            "requires_grad": [tensor.requires_grad for _, tensor in named],
            "graph": [tensor.grad_fn is None for _, tensor in named],
            "grad": {name: tensor.grad for name, tensor in named},
            "tensor hooks": [str(tensor._backward_hooks) for _, tensor in named],
            "modes": {name: module.training for name, module in model.named_modules()},
            "hooks": [
                [name, *(list(getattr(module, hooks)) for hooks in HOOKS)]
                for name, module in model.named_modules()
            ],
            "attributes": [sorted(vars(module)) for module in model.modules()],
            "optimizer": self.optimizer.state_dict(),
            "checkpoint": self.checkpoint._compared(),
            "batches": [list(vars(b).values()) if hasattr(b, "tokens") else list(b) for b in batches],
            "torch": torch.get_rng_state(),
            "python": [version, *words, gauss],
            "numpy": [*legacy["state"]["key"].tolist(), legacy["state"]["pos"]],
            "grad mode": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "dtype": str(torch.get_default_dtype()),
        }

    def changes(self):
        return differences(self.before, copied(self.seen()))

    def run(self, verb, start="stored", measure=None):
        states = {"stored": self.checkpoint, "fresh": self.checkpoint.with_fresh_optimizer(), "none": None}
        return VERBS[verb](self.recipe, states[start], self.pair, measure or self.measure)


SMALL = [("MLP", v) for v in VERBS if v != "positions"] + [("toy", v) for v in ("factors", "positions")]


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        *SMALL,
        *[("convolutions", v) for v in ("signals", "signals and forward", "factors")],
        *[("LSTM", v) for v in ("signals", "signals and forward", "factors", "cache")],
    ],
)
def test_a_verb_leaves_everything_as_it_was(name, verb):
    mine = Belongings(name)
    mine.run(verb)
    assert mine.changes() == []


@pytest.mark.parametrize("verb", ["signals", "factors"])
@pytest.mark.parametrize("optimizer", ["SGD momentum", "Adam amsgrad"])
@pytest.mark.parametrize("start", ["fresh", "none"])
def test_it_does_with_any_optimizer_and_any_beginning(verb, optimizer, start):
    mine = Belongings("MLP", optimizer)
    mine.run(verb, start)
    assert mine.changes() == []


@pytest.mark.parametrize(("name", "verb"), SMALL)
@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_a_loss_that_raises_leaves_everything_as_it_was(name, verb, call):
    """The first pass, the second, one with taps attached; a verb that takes fewer passes ends in peace."""
    mine = Belongings(name, breaks_at=call)
    passes = {"signals": 5, "signals and forward": 5, "factors": 4, "positions": 4, "cache": 1}[verb]
    if call < passes:
        with pytest.raises(Broken):
            mine.run(verb)
    else:
        mine.run(verb)
    assert mine.changes() == []


@pytest.mark.parametrize(("name", "verb"), [pair for pair in SMALL if pair[1] != "cache"])
@pytest.mark.parametrize("call", [0, 2, 5])
def test_a_measure_that_raises_leaves_everything_as_it_was(name, verb, call):
    calls = []

    def measure(model, batch):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        calls.append(batch)
        if len(calls) > call:
            raise Broken
        return torch.zeros(())

    mine = Belongings(name)
    with pytest.raises(Broken):
        mine.run(verb, measure=measure)
    assert mine.changes() == []


@pytest.mark.parametrize("verb", ["factors", "positions"])
def test_a_site_that_turns_out_to_have_no_factors_leaves_everything_as_it_was(verb):
    """Positions of a layer without any: the error comes when both runs have been read."""
    mine = Belongings("MLP" if verb == "positions" else "LSTM")
    short = tokens(1, rows=3)
    if verb == "factors":
        mine.pair = replace(mine.pair, source=short)
        mine.before = copied(mine.seen())
    with pytest.raises(SiteError):
        mine.run(verb)
    assert mine.changes() == []


def test_factors_of_a_layer_that_drops_units_leave_the_callers_generators_where_they_stand():
    model = made(lambda: Lstm(dropout=0.3))
    recipe = dy.Recipe(model, dy.measures.cross_entropy, OPTIMIZERS["AdamW"])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    pair = dy.Contrast(tokens(1), tokens(2), tokens(3))
    with contextlib.suppress(SiteError):  # that it cannot be done is another matter
        of_factors(recipe, None, pair, dy.measures.correct_logit)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "verb"), [pair for pair in SMALL if pair[1] != "cache"])
def test_the_same_call_gives_the_same_bits_wherever_the_callers_generators_stand(name, verb):
    mine = Belongings(name)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        found.append(mine.run(verb))
    assert found[0].drop_attrs().identical(found[1].drop_attrs())


@pytest.mark.parametrize(("name", "verb"), [pair for pair in SMALL if pair[1] != "cache"])
def test_the_models_own_weights_do_not_matter_when_a_checkpoint_is_given(name, verb):
    mine = Belongings(name)
    one = mine.run(verb)
    with torch.no_grad():
        for tensor in mine.recipe.model.parameters():
            tensor.fill_(torch.nan)
    assert one.drop_attrs().identical(mine.run(verb).drop_attrs())


def test_a_copy_of_the_model_is_as_good_as_the_model():
    mine = Belongings("MLP")
    one = mine.run("signals")
    mine.recipe = replace(mine.recipe, model=copy.deepcopy(mine.recipe.model))
    assert one.drop_attrs().identical(mine.run("signals").drop_attrs())


@pytest.mark.parametrize("verb", ["signals", "factors"])
def test_a_hook_of_the_users_sees_only_the_passes_that_are_taken(verb):
    """Base and source; of signals a check of each activation, of factors two recordings; a measure per stack."""
    recipe = classifier_recipe(optimizer=OPTIMIZERS["SGD"])
    calls = []
    recipe.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    pair = dy.Contrast(points(1), points(2), points(3))
    measured = 1 + 1 + 1  # one reference by itself, the references, the patched models
    if verb == "signals":
        patched = [Site("encoder", {"encoder": ...}), Site("head", {"head": ...})]
        dy.patch_signals(recipe, None, [pair], patched, margin)
        assert len(calls) == (2 + 2) + measured
    else:
        dy.patch_factors(recipe, None, [pair], linear_parameters(recipe.model), margin)
        assert len(calls) == (2 + 2) + measured
