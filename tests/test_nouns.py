"""Every noun says what it is in a line or a few: shapes and names, never the numbers, also at GPT-2's size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers
from torch import nn

import dynamics as dy
from checkpoints import OptimizerState, RngState
from dynamics.config import AcronymsRun, FactsRun, IoiRun, StudyConfig
from dynamics.trees import described

SCREEN = 2000
"""Characters of a screen."""

with torch.device("meta"):  # names and shapes of GPT-2 small, and no numbers
    GPT2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())

PARAMETERS = dict(GPT2.named_parameters())


def tokens(n_rows: int, n_pos: int, **more: torch.Tensor) -> dy.Batch:
    scored = torch.arange(n_rows)
    return dy.Batch(torch.zeros(n_rows, n_pos, dtype=torch.int64), scored, scored, **more)


def contrast() -> dy.Contrast:
    batch = tokens(64, 1024, distractors=torch.zeros(64, 25))
    return dy.Contrast(batch, batch, {"input_ids": torch.zeros(3, 7)}, {"example": "alias 17", "set": "Dt3"})


def optimizer_state() -> OptimizerState:
    """One group for each parameter, as layer-wise learning rates make them."""
    groups = [{"params": [p], "lr": torch.tensor(0.1)} for p in PARAMETERS.values()]
    state = dy.Checkpoint.capture(GPT2, torch.optim.AdamW(groups)).optimizer
    assert state is not None
    kept = {
        name: {"step": torch.tensor(1.0), "exp_avg": p, "exp_avg_sq": p} for name, p in PARAMETERS.items()
    }
    return OptimizerState(state.groups, kept)


def cache() -> dy.steps.Cache:
    kept = {f"transformer.h.{i}.{part}": torch.zeros(8, 16) for i in range(12) for part in ("attn", "mlp")}
    return dy.steps.Cache(kept, dict(kept))


def placebo() -> dy.sites.Site:
    net = nn.Linear(64, 64)
    (site,) = dy.sites.matching(net, {"a bias": "bias"})
    return dy.sites.placebo(site, {name: torch.ones_like(p) for name, p in net.named_parameters()}, 1)[0]


def recipe() -> dy.Recipe:
    optimizer = partial(torch.optim.AdamW, lr=1e-3, betas=torch.tensor([0.9, 0.99]))
    return dy.Recipe(GPT2, dy.measures.cross_entropy, optimizer, max_grad_norm=1.0)


NOUNS = {
    "a batch": (
        lambda: tokens(64, 1024),
        ["Batch(", "tokens=int64[64, 1024]", "target_pos=int64[64]", "targets=int64[64]"],
    ),
    "a contrast": (
        contrast,
        [
            *("Contrast(", "base=Batch(", "source=Batch(", "tokens=int64[64, 1024]"),
            *("distractors=float32[64, 25]", "'input_ids': float32[3, 7]", "alias 17", "Dt3"),
        ],
    ),
    "a window": (
        lambda: dy.Contrast([tokens(64, 4)] * 50, [tokens(64, 4)] * 50),
        ["base=[Batch(", "source=[Batch(", "44 more"],
    ),
    "a recipe": (
        recipe,
        [
            *("GPT2LMHeadModel of 124,439,808 parameters", "loss=cross_entropy"),
            *("optimizer=AdamW(lr=0.001, betas=float32[2])", "clip=ByNorm(max_norm=1.0, over='model')"),
        ],
    ),
    "a site": (
        lambda: dy.sites.heads(GPT2)[14],
        [
            "Site('L1H2', part of transformer.h.1.attn.c_attn.weight and ",
            "level='heads'",
            "layer=1",
            "head=2",
        ],
    ),
    "a whole parameter's site": (
        lambda: dy.sites.matching(GPT2, {"norm": "transformer.ln_f.weight"})[0],
        ["Site('norm', all of transformer.ln_f.weight"],
    ),
    "a site with positions": (
        lambda: dy.sites.Site("late", {"w": ...}, positions=(2, 3)),
        ["Site('late', all of w, positions=(2, 3))"],
    ),
    "a site that covers nothing": (lambda: dy.sites.Site("none", {}), ["Site('none', nothing)"]),
    "a path": (
        lambda: dy.sites.Path("embed -> mlp 1", {"hook": ...}, {"layer": 1}, None, (("embed", "mlp 1"),)),
        ["Path('embed -> mlp 1', all of hook, layer=1)"],
    ),
    "a placebo": (placebo, ["placebo 0 of a bias", "part of weight and 1 more", "draw=0"]),
    "a union of all": (
        lambda: dy.sites.complement(GPT2, dy.sites.matching(GPT2, {"norm": "transformer.ln_f.weight"})[0]),
        ["all but norm", "146 more"],
    ),
    "a step's gradient": (
        lambda: dy.steps.StepGradient(torch.ones(()), PARAMETERS, {}, RngState.capture()),
        [
            *("StepGradient(", "loss=float32[]", "'transformer.wte.weight': float32[50257, 768]"),
            *("142 more", "rng=RngState("),
        ],
    ),
    "a cache": (cache, ["Cache(", "'transformer.h.0.attn': float32[8, 16]", "signals=", "18 more"]),
    "an optimizer's state": (
        optimizer_state,
        ["148 groups of 148 parameters", "step, exp_avg, exp_avg_sq of 148 parameters"],
    ),
    "an optimizer's state without moments": (
        lambda: OptimizerState(({"params": ["w"], "lr": 0.1},), {}),
        ["OptimizerState(1 group of 1 parameters; state: none)"],
    ),
    "random number generators": (RngState.capture, ["RngState(", "torch", "Python", "NumPy"]),
    "the alias task": (
        lambda: dy.tasks.AliasTask(StudyConfig()),
        ["AliasTask(", "seed 0", "124 tokens", "pretrain ", "x2 ", "modulus=60"],
    ),
    "the acronyms": (lambda: dy.tasks.AcronymsTask(AcronymsRun()), ["AcronymsTask(", "n_words="]),
    "the facts": (lambda: dy.tasks.FactsTask(FactsRun(seed=5)), ["FactsTask(", "seed 5", "late "]),
    "the sentences": (lambda: dy.tasks.IoiTask(IoiRun()), ["IoiTask(", "n_names="]),
}


@pytest.mark.parametrize("name", NOUNS)
def test_a_noun_says_what_it_is_on_less_than_a_screen(name: str) -> None:
    made, expected = NOUNS[name]
    text = repr(made())
    assert [words for words in expected if words not in text] == []
    assert "tensor(" not in text
    assert "object at 0x" not in text
    assert len(text) < SCREEN


def test_contrasts_and_sites_are_short_in_a_list() -> None:
    task = dy.tasks.AliasTask(StudyConfig())
    assert max(len(repr(each)) for each in task.contrasts()) < 350
    sites = [*dy.sites.heads(GPT2), *dy.sites.matrices(GPT2), *dy.sites.layers(GPT2)]
    assert max(len(repr(each)) for each in sites) < 150


@dataclass
class Pair:
    """A batch of somebody's own."""

    left: torch.Tensor
    right: torch.Tensor | None = None


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (torch.zeros(2, 3), "float32[2, 3]"),
        (nn.Parameter(torch.zeros(2)), "float32[2]"),
        (torch.zeros(3, dtype=torch.int32).numpy(), "int32[3]"),
        (Pair(torch.zeros(1)), "Pair(left=float32[1])"),
        ((torch.zeros(1), ["a", 2.5, None]), "(float32[1], ['a', 2.5, None])"),
        ((torch.zeros(1),), "(float32[1],)"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, ... and 94 more]"),
        ({"x": torch.zeros(0, 2)}, "{'x': float32[0, 2]}"),
        ("word " * 100, "'" + ("word " * 100)[:99] + "..."),
        (range(10**6), "range(0, 1000000)"),
        (frozenset(range(1000)), "<frozenset>"),
        (Pair, repr(Pair)),
    ],
)
def test_a_tree_of_tensors_is_described_by_dtypes_and_shapes(tree: object, text: str) -> None:
    assert described(tree) == text


def test_what_a_tokenizer_gives_is_described_by_its_entries() -> None:
    encoded = transformers.BatchEncoding({"input_ids": torch.zeros(2, 5, dtype=torch.int64)})
    assert described(encoded) == "{'input_ids': int64[2, 5]}"
