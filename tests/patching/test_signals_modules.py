"""Signals in modules that run twice, give tuples, write in place, stand in low precision, or are recomputed."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.recipe import RecipeError
from dynamics.sites import Site
from tests.zoo.signal_models import (
    ALL,
    RECIPES,
    REVEALING,
    LastState,
    Mlp,
    begun,
    contrast_of,
    filled,
    images,
    largest,
    made,
    off,
    revealed,
    scored_at,
    sequences,
    toy_recipe,
)
from tests.zoo.small_models import classifier_loss, classifier_recipe, margin, outcomes, points, same

# --- a module that runs several times ---------------------------------------------------------------------


def test_of_a_layer_that_runs_twice_each_run_adds_its_own_signal_times_its_own_input():
    recipe, pair = RECIPES["odd"](), contrast_of("odd")
    model = recipe.model

    def run(batch):
        x = model.embed(batch.tokens)
        once = model.twice(x)
        between = once.tanh()
        again = model.twice(between)
        logits = model.head(again.tanh())[torch.arange(len(batch)), batch.target_pos]
        loss = nn.functional.cross_entropy(logits, batch.targets)
        return x, once, between, again, loss

    *_, theirs_once, _, theirs_again, loss = run(pair.source)
    signals = torch.autograd.grad(loss, [theirs_once, theirs_again])
    x, once, between, again, loss = run(pair.base)
    ours_once, ours_again = torch.autograd.grad(loss, [once, again], retain_graph=True)
    x, between = x.detach(), between.detach()
    patched = torch.einsum("bpo,bpi->oi", signals[0], x) + torch.einsum("bpo,bpi->oi", signals[1], between)
    found = revealed(dy.patch_signals, recipe, None, pair, [Site("both", {"twice": ...})])["both"]
    assert off({"w": found["twice.weight"]}, {"w": patched}) < 1e-13
    assert off({"b": found["twice.bias"]}, {"b": (signals[0] + signals[1]).sum((0, 1))}) < 1e-13
    kept = dy.cache(recipe, None, pair.base)
    assert off({"": kept.signals["twice"]}, {"": ours_once}) < 1e-13
    assert off({"": kept.signals["twice[1]"]}, {"": ours_again}) < 1e-13


def test_a_loss_that_calls_the_model_twice_gives_every_module_two_signals():
    def loss(model, batch):
        x, y = batch
        return classifier_loss(model, batch) + 2.0 * classifier_loss(model, (x * 0.5, y))

    recipe, pair = classifier_recipe(loss=loss, optimizer=REVEALING), contrast_of("MLP")
    once = dy.cache(classifier_recipe(), None, pair.base)
    kept = dy.cache(recipe, None, pair.base)
    assert kept.signals.keys() == {f"{n}{i}" for n in once.signals for i in ("", "[1]")}
    assert torch.equal(kept.signals["head"], once.signals["head"])
    assert not torch.equal(kept.signals["head[1]"], once.signals["head"])
    theirs = dy.cache(recipe, None, pair.source).signals
    found = revealed(dy.patch_signals, recipe, None, pair, [Site("head", {"encoder": ...})])["head"]
    x = pair.base[0]
    expected = theirs["encoder"].T @ x + theirs["encoder[1]"].T @ (x * 0.5)
    assert off({"w": found["encoder.weight"]}, {"w": expected}) < 1e-13


# --- tuples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", ["base", "source"])
def test_of_an_lstm_the_states_are_exchanged_and_its_last_ones_are_not(forward):
    """(states, (h, c)): the loss of the states alone is the whole signal; positions are its axis 1."""
    recipe, pair = RECIPES["LSTM"](), contrast_of("LSTM")
    model = recipe.model
    parts = dict(model.lstm.named_parameters(prefix="lstm"))
    kept = [dy.cache(recipe, None, batch) for batch in (pair.base, pair.source)]
    states = model.lstm(model.embed(pair.base.tokens))[0]
    assert torch.equal(kept[0].activations["lstm"], states)
    patched = [Site("all", {"lstm": ...}), Site("at 2", {"lstm": (ALL, 2)})]
    found = revealed(lambda *a: dy.patch_signals(*a, forward=forward), recipe, None, pair, patched)
    expected = dict(
        zip(
            parts,
            torch.autograd.grad(states, parts.values(), kept[1].signals["lstm"], retain_graph=True),
            strict=True,
        )
    )
    assert off({n: found["all"][n] for n in parts}, expected) < 1e-13
    if forward == "base":
        signal = kept[0].signals["lstm"].clone()
        signal[:, 2] = kept[1].signals["lstm"][:, 2]
        expected = dict(zip(parts, torch.autograd.grad(states, parts.values(), signal), strict=True))
        assert off({n: found["at 2"][n] for n in parts}, expected) < 1e-13
    assert off(found["all"], found["at 2"]) > 1e-3


def test_tensors_of_an_output_after_the_first_are_neither_read_nor_exchanged():
    recipe = classifier_recipe(model=made(LastState), optimizer=REVEALING)
    pair = dy.Contrast(sequences(1), sequences(2), sequences(3))
    assert not dy.cache(recipe, None, pair.base).signals["lstm"].any()
    found = outcomes(dy.patch_signals, recipe, None, pair, sites.activations(recipe.model, "*"))
    assert same(found["lstm"], found["base"])
    assert not same(found["head"], found["base"])


class Packed(nn.Module):
    """An LSTM of packed sequences, whose output is a named tuple with a tensor in it."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        lengths = torch.tensor([4, 4, 3, 3, 2, 1])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(states.mean(1))


def test_a_named_tuple_comes_back_as_what_it_was():
    recipe = classifier_recipe(model=made(Packed), optimizer=REVEALING)
    pair = dy.Contrast(sequences(1), sequences(2), sequences(3))
    kept = dy.cache(recipe, None, pair.base)
    assert kept.activations["lstm"].shape == (17, 4)
    found = revealed(dy.patch_signals, recipe, None, pair, [Site("all", {"lstm": ...})])
    assert (
        off({n: found["all"][n] for n in ("head.weight",)}, {"head.weight": found["base"]["head.weight"]})
        == 0
    )
    assert off(found["all"], found["base"]) > 1e-3


# --- writing in place -------------------------------------------------------------------------------------


def test_what_a_relu_in_place_overwrites_is_cached_as_it_was_and_its_signal_is_the_one_before_the_relu():
    recipe, batch = RECIPES["convolutions"](), images(10)
    model = recipe.model
    kept = dy.cache(recipe, None, batch)
    first = nn.functional.conv2d(batch[0], model.first.weight, model.first.bias)
    assert torch.equal(kept.activations["first"], first)
    assert (kept.activations["first"] < 0).any()
    assert torch.equal(kept.activations["relu"], first.relu())
    above = kept.signals["relu"] * (first > 0)
    assert off({"": kept.signals["first"]}, {"": above}) < 1e-15
    gradient = filled(model, dy.steps.gradient(recipe, Checkpoint.capture(model), batch).gradients)
    assert off({"b": gradient["first.bias"]}, {"b": above.sum((0, 2, 3))}) < 1e-13


# --- low precision ----------------------------------------------------------------------------------------


def in_bf16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return classifier_loss(model, batch)


@pytest.mark.parametrize("forward", ["base", "source"])
def test_under_autocast_the_replaced_signal_is_the_sources_to_the_bit(forward):
    """One row and a bias of zero: the parameter after the step is the signal itself, with its sign reversed.

    λ_U + (λ_R − λ_U) in bf16 would be another number.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mlp()
    nn.init.zeros_(model.inner.bias)
    recipe = classifier_recipe(model=model, loss=in_bf16, optimizer=REVEALING)
    pair = dy.Contrast(*(points(seed, rows=1, dtype=torch.float32) for seed in range(3)))
    ours, theirs = (dy.cache(recipe, None, b, "inner").signals["inner"] for b in (pair.base, pair.source))
    assert theirs.dtype == torch.bfloat16
    assert not torch.equal(ours + (theirs - ours), theirs)
    site = Site("inner", {"inner": ...})
    found = outcomes(lambda *a: dy.patch_signals(*a, forward=forward), recipe, None, pair, [site])
    assert torch.equal(-found["inner"]["inner.bias"], theirs[0].float())
    assert not torch.equal(found["inner"]["inner.bias"], found["base"]["inner.bias"])


@pytest.mark.slow
@pytest.mark.parametrize("forward", ["base", "source"])
def test_a_transformer_under_autocast_exchanges_signals_at_every_hook(forward):
    recipe = dataclasses.replace(toy_recipe(), loss=dy.measures.cross_entropy_in_bf16)
    pair = contrast_of("LN gelu")
    recipe.model.float()
    patched = sites.activations(recipe.model, "blocks.1.*hook_*")
    kept = dy.cache(recipe, None, pair.base).signals
    assert {s.dtype for s in kept.values()} == {torch.bfloat16, torch.float32}
    found = revealed(lambda *a: dy.patch_signals(*a, forward=forward), recipe, None, pair, patched)
    scale = largest(found["base"])
    for site in patched:
        assert all(torch.isfinite(g).all() for g in found[site.label].values())
        assert off(found[site.label], found["base"], scale) > 1e-3, site.label


# --- recomputed in the backward pass ----------------------------------------------------------------------


class Recomputed(Mlp):
    """Its inner layer is run again in the backward pass instead of being remembered."""

    def forward(self, x):
        hidden = self.activation(self.lower(x))
        inner = recomputed(lambda h: self.activation(self.inner(h)).square(), hidden, use_reentrant=False)
        return self.upper(hidden + inner)


class Remembered(Recomputed):
    """The same without."""

    def forward(self, x):
        hidden = self.activation(self.lower(x))
        return self.upper(hidden + self.activation(self.inner(hidden)).square())


def test_activation_checkpointing_recomputes_with_the_weights_of_the_checkpoint():
    recipe = classifier_recipe(model=made(Recomputed), optimizer=REVEALING)
    live = begun(recipe, "MLP")
    batch = points(10)
    found = dy.steps.gradient(recipe, live.last, batch).gradients
    live.model.zero_grad()
    classifier_loss(live.model, batch).backward()
    assert off(found, {n: p.grad for n, p in live.model.named_parameters()}) < 1e-12


def test_a_recomputed_module_is_refused_with_the_advice_to_turn_that_off():
    recipe = classifier_recipe(model=made(Recomputed), optimizer=REVEALING)
    with pytest.raises(RecipeError, match=r"'inner' is recomputed .*gradient_checkpointing_disable"):
        dy.cache(recipe, None, points(10))
    assert dy.cache(recipe, None, points(10), "[lu]*er").signals.keys() == {"lower", "upper"}


@pytest.mark.parametrize("name", ["lower", "upper"])
def test_with_the_models_own_weights_activation_checkpointing_changes_no_patched_gradient(name):
    pair = contrast_of("MLP")
    one, other = (
        revealed(
            dy.patch_signals,
            classifier_recipe(model=made(kind), optimizer=REVEALING),
            None,
            pair,
            [Site(name, {name: ...})],
        )
        for kind in (Recomputed, Remembered)
    )
    for label in (name, "base", "source"):
        assert off(one[label], other[label]) < 1e-13


# --- what stands in a model beside ------------------------------------------------------------------------


def test_a_users_own_hook_comes_first_and_its_output_is_what_is_exchanged():
    recipe, pair = classifier_recipe(optimizer=REVEALING), contrast_of("MLP")
    plain = dy.cache(recipe, None, pair.base)
    recipe.model.encoder.register_forward_hook(lambda _, __, out: out * 2)
    kept = dy.cache(recipe, None, pair.base)
    assert torch.equal(kept.activations["encoder"], plain.activations["encoder"] * 2)
    theirs = dy.cache(recipe, None, pair.source).signals["encoder"]
    found = revealed(dy.patch_signals, recipe, None, pair, [Site("all", {"encoder": ...})])["all"]
    assert off({"b": found["encoder.bias"]}, {"b": 2 * theirs.sum(0)}) < 1e-13


def test_where_the_loss_depends_on_later_positions_not_at_all_their_signals_are_zero():
    recipe = toy_recipe()
    batch = scored_at(contrast_of("LN gelu").base, 2)
    kept = dy.cache(recipe, None, batch, "*hook_resid_*").signals
    for signal in kept.values():
        assert not signal[:, 3].any()
        assert signal[:, 2].all()


def test_dropout_draws_the_same_in_both_runs_and_in_every_cell():
    """λ_R was recorded under the mask that the base run is multiplied by."""
    recipe, pair = RECIPES["MLP relu dropout"](), contrast_of("MLP")
    checkpoint = begun(recipe, "MLP").last
    kept = [dy.cache(recipe, checkpoint, b).activations["drop"] for b in (pair.base, pair.base, pair.source)]
    assert torch.equal(kept[0], kept[1])
    dropped = [(a == 0) for a in kept]
    assert (dropped[0] & dropped[2]).float().mean() > 0.2
    result = dy.patch_signals(recipe, checkpoint, [pair] * 2, sites.activations(recipe.model, "*"), margin)
    assert (result["effect"][0] == result["effect"][1]).all()


class Clamped(nn.Module):
    """A backward pass that is not linear: what arrives at the hidden layer is clamped."""

    def __init__(self):
        super().__init__()
        self.lower, self.middle, self.upper = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.lower(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda signal: signal.clamp(-1e-3, 1e-3))
        return self.upper(self.middle(hidden).relu())


def test_where_backward_is_not_linear_each_site_is_taken_by_itself():
    torch.manual_seed(0)
    recipe = classifier_recipe(model=Clamped().double(), optimizer=REVEALING)
    pair = dy.Contrast(points(1), points(2), points(3))
    patched = [Site("all", {"middle": ...}), Site("some", {"middle": (slice(0, 3),)})]
    found = revealed(dy.patch_signals, recipe, None, pair, patched)
    kept = dy.cache(recipe, None, pair.source, "middle")
    for site in patched:
        model, index = copy.deepcopy(recipe.model), site.covers["middle"]

        def replace(module, inputs, output, index=index):
            def change(signal):
                signal = signal.clone()
                signal[index] = kept.signals["middle"][index]
                return signal

            output.register_hook(change)

        model.middle.register_forward_hook(replace)
        recipe.loss(model, pair.base).backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        assert off(found[site.label], expected) < 1e-12
        assert off(found["base"], expected) > 1e-6
