"""Passes taken up where the first change is: they give what whole passes give, and leave out what comes before."""

import contextlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.engine import measuring
from dynamics.engine.resumed_forward import CachedPrefix, cache_prefix
from dynamics.measures import LogitMeasure
from dynamics.models.functional import call_with
from dynamics.steps.states import starting_point
from tests.zoo.hugging_face import gpt2, llama
from tests.zoo.small_models import D_VOCAB, tokens, transformer

CONTRASTS = [dy.Contrast(tokens(i), tokens(i + 10), tokens(i + 20), {"example": f"{i}"}) for i in range(2)]


class Blocks(nn.Module):
    """Layers one after another; `step` is what each does with its own and with the first."""

    def __init__(self, step, n=4):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.embed = nn.Embedding(D_VOCAB, 5)
            self.blocks = nn.ModuleList(step(nn.Linear(5, 5)) for _ in range(n))
            self.head = nn.Linear(5, D_VOCAB)
        self.double()

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x).tanh()


class Restless(Block):
    """Draws a number also in eval mode."""

    def forward(self, x):
        return super().forward(x) + 0 * torch.rand(())


class Writing(Block):
    """Adds to what it is given in place."""

    def forward(self, x):
        return x.add_(self.layer(x.clone()).tanh())


class Counting(Block):
    def __init__(self, layer):
        super().__init__(layer)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + 0.1 * self.calls


class Reading(Blocks):
    """The first block uses the head's weights, which it does not own."""

    def __init__(self):
        super().__init__(Block)
        head = [self.head]
        self.blocks[0].forward = lambda x: x + F.linear(x, head[0].weight).tanh() @ head[0].weight


class Twice(Blocks):
    """A block that runs inside another first and by itself later."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in (*self.blocks, self.blocks[1].layer, self.blocks[0]):
            x = block(x)
        return self.head(x)


MODELS = {
    "toy": transformer,
    "attention only": lambda: transformer(attn_only=True),
    "GPT-2": gpt2,
    "Llama": llama,
    "blocks": lambda: Blocks(Block),
    "reading": Reading,
    "twice": lambda: Twice(Block),
}


PROBABILITY = dy.measures.probability


def recipe_of(model):
    return dy.Recipe(model, dy.measures.cross_entropy, partial(torch.optim.AdamW, lr=1e-2), max_grad_norm=0.1)


def begun(model, probe, n_bytes=2**20):
    state = starting_point(recipe_of(model), None)
    tensors = {**state.parameters, **{name: buffer.clone() for name, buffer in state.buffers.items()}}
    return cache_prefix(
        lambda given: call_with(dy.measures.correct_logit, model.eval(), given, probe),
        model,
        tensors,
        n_bytes,
    )


def exchanged(
    model, watched=None, resume=True, n_bytes=1, measure=dy.measures.correct_logit, contrasts=CONTRASTS
):
    """What patch_updates finds, and how often the watched submodule's forward was taken."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "is_large", lambda parameters: resume)
        patch.setattr(measuring, "memory_budget", lambda *given: 2**20)  # whatever stacks may take
        if watched is not None:
            forward = watched.forward
            patch.setitem(
                vars(watched), "forward", lambda *given, **kw: runs.append(1) or forward(*given, **kw)
            )
        with dy.max_memory(n_bytes):
            found = dy.patch_updates(
                recipe_of(model), None, contrasts, sites.parameters(model), {"m": measure, "p": PROBABILITY}
            )
    return found, len(runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_bytes", [1, 20_000])
def test_exchanges_are_those_of_whole_passes(name, n_bytes):
    """One stack for every site, and a few sites in each."""
    model = MODELS[name]()
    found, _ = exchanged(model, n_bytes=n_bytes)
    whole, _ = exchanged(model, resume=False, n_bytes=n_bytes)
    for variable in whole.data_vars:
        np.testing.assert_allclose(found[variable], whole[variable], rtol=0, atol=1e-12)
    assert float(abs(whole["effect"]).max()) > 1e-3


def test_each_probe_has_a_beginning_of_its_own():
    model, pair = Blocks(Block), CONTRASTS[0]
    probed = [replace(pair, probe=tokens(i), coords={"example": f"{i}"}) for i in range(3)]
    found, _ = exchanged(model, contrasts=probed)
    whole, _ = exchanged(model, resume=False, contrasts=probed)
    for variable in whole.data_vars:
        np.testing.assert_allclose(found[variable], whole[variable], rtol=0, atol=1e-12)


def test_what_comes_before_the_first_change_is_not_taken_again():
    for number, n_later in ((0, 8), (3, 2)):  # sites after it
        model = Blocks(Block)
        _, whole = exchanged(model, model.blocks[number], resume=False)
        _, resumed = exchanged(model, model.blocks[number])
        kept = 1  # the pass that is kept
        assert whole - resumed == len(CONTRASTS) * (n_later - kept), number


def test_passes_under_a_users_own_measure_are_resumed_too():
    def measure(model, batch):
        return dy.measures.correct_logit(model, batch)

    model = Blocks(Block)
    found, resumed = exchanged(model, model.blocks[0], measure=measure)
    whole, n = exchanged(model, model.blocks[0], resume=False, measure=measure)
    n_later, kept = (
        8,
        2,
    )  # beside a measure of the logits it takes a pass of its own; the first one is resumed
    assert n - resumed == len(CONTRASTS) * (n_later - kept)
    np.testing.assert_allclose(found["patched"], whole["patched"], rtol=0, atol=1e-12)


def test_a_module_that_reads_weights_of_another_is_taken_again_where_they_change():
    model = Reading()
    assert float(abs(exchanged(model)[0]["effect"].sel(site="head.weight")).max()) > 1e-4
    probe = CONTRASTS[0].probe
    kept = begun(model, probe)
    assert kept.first_read["head.weight"] < min(c.end for c in kept.calls if c.name == "blocks.0")
    assert kept.first_read["head.bias"] > max(c.end for c in kept.calls if c.name == "blocks.3")


def test_runs_inside_a_run_that_is_left_out_are_left_out_with_it():
    model = Twice(Block)
    kept = begun(model, CONTRASTS[0].probe)
    assert [call.name for call in kept.calls].count("blocks.1.layer") == 2
    taken = []
    for name in ("blocks.0", "blocks.1", "blocks.1.layer", "blocks.2", "head"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: taken.append(name))
    with torch.no_grad(), kept.resumed(model, ["head.weight"]):
        logits = model(CONTRASTS[0].probe.tokens)
    assert taken == ["blocks.0", "blocks.1", "blocks.2", "blocks.1.layer", "blocks.0", "head"]
    assert torch.equal(logits, model(CONTRASTS[0].probe.tokens))


def test_no_more_is_kept_than_there_is_memory_for():
    model, probe = Blocks(Block), CONTRASTS[0].probe
    kept = begun(model, probe)
    size = sum(call.output.nbytes for call in kept.calls)
    assert len(begun(model, probe, n_bytes=size).calls) == len(kept.calls)
    with pytest.raises(MemoryError):
        begun(model, probe, n_bytes=size - 1)
    assert not any("forward" in vars(module) for module in model.modules())


def test_in_another_order_it_cannot_be_resumed():
    model = Blocks(Block)
    kept = begun(model, CONTRASTS[0].probe)
    with (
        torch.no_grad(),
        kept.resumed(model, ["head.weight"]),
        pytest.raises(LookupError, match="runs where embed did"),
    ):
        model.head(torch.zeros(5).double())
    with torch.no_grad(), kept.resumed(model, ["head.weight"]):
        model(CONTRASTS[0].probe.tokens)
        with pytest.raises(LookupError):
            model(CONTRASTS[0].probe.tokens)


@pytest.mark.parametrize("step", [Restless, Writing, Counting])
def test_a_pass_that_does_more_than_compute_is_not_kept(step):
    model = Blocks(step)
    assert begun(model, CONTRASTS[0].probe) is None
    found, whole = (exchanged(model, resume=resume)[0] for resume in (True, False))
    for variable in whole.data_vars:
        np.testing.assert_allclose(found[variable], whole[variable], rtol=0, atol=1e-12)


def test_a_pass_that_leads_elsewhere_is_not_resumed_again(monkeypatch):
    """A measure that sees a model's tensors, for which a block's output is not all that it does."""
    model, noted = Blocks(Block), []

    class Noting(Block):
        def forward(self, x):
            noted.append(1)
            return super().forward(x)

    model.blocks[0] = Noting(model.blocks[0].layer)

    def read(logits, batch):
        passed = len(noted)
        noted.clear()
        return logits.sum(-1) * (1 if passed else 2)

    measure, resumed = LogitMeasure("noted", "1", read), []
    resume = CachedPrefix.resumed
    monkeypatch.setattr(CachedPrefix, "resumed", lambda *given: resumed.append(1) or resume(*given))
    found, _ = exchanged(model, measure=measure)
    assert len(resumed) == len(CONTRASTS) * (3 + 1)  # three sites up to that block, and one after it
    whole, _ = exchanged(model, resume=False, measure=measure)
    for variable in whole.data_vars:
        np.testing.assert_allclose(found[variable], whole[variable], rtol=0, atol=1e-12)


def test_forwards_are_the_models_own_again_also_after_an_error():
    model = Reading()
    own = vars(model.blocks[0])["forward"]
    kept = begun(model, CONTRASTS[0].probe)
    with contextlib.suppress(KeyError), kept.resumed(model, ["head.weight"]):
        assert vars(model.blocks[0])["forward"] is not own
        assert "forward" in vars(model.head)
        raise KeyError
    assert vars(model.blocks[0])["forward"] is own
    assert not any("forward" in vars(module) for module in model.modules() if module is not model.blocks[0])


def test_what_is_kept_is_not_what_later_runs_write_into():
    model = Blocks(Block)
    kept = begun(model, CONTRASTS[0].probe)
    last = next(call for call in kept.calls if call.name == "blocks.3")
    before = last.output.clone()
    model.head.register_forward_pre_hook(lambda module, inputs: (inputs[0].zero_(),))
    with torch.no_grad(), kept.resumed(model, ["head.weight"]):
        model(CONTRASTS[0].probe.tokens)
    assert torch.equal(last.output, before)
    assert float(before.abs().max()) > 0
