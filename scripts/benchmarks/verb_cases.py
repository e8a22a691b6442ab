"""What benchmarks of the verbs run on: the toy, the seed's size, and GPT-2 small of random parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
import xarray as xr
from torch import Tensor, nn

import dynamics as dy
from checkpoints import Checkpoint
from dynamics.batch import Batch
from scripts.benchmarks.patching_speed import Bench, config_of

VERBS = ("patch_gradients", "patch_updates", "patch_signals", "attribute_step")
N_SITES = {"toy": 46, "seed": 12, "gpt2": 12, "tiny": 3}
"""Sites that are exchanged; attributions are of all heads or matrices."""

WARM_STEPS = 2


@dataclass(frozen=True)
class Case:
    """One verb on one model.

    Attributes:
        bench: recipe, state, contrasts.
        verb: its name.
        sites: what it is asked about.
    """

    bench: Bench
    verb: str
    sites: list[dy.Site]

    def __call__(self) -> xr.Dataset:
        """The verb of the first contrast."""
        bench, measure = self.bench, dy.measures.correct_logit
        function: Callable[..., xr.Dataset] = getattr(dy, self.verb)
        return function(bench.recipe, bench.state, bench.contrasts[:1], self.sites, measure)


def n_bytes(bench: Bench) -> int:
    """Of the model's parameters."""
    return sum(p.nbytes for p in bench.recipe.model.parameters())


def bench_of(size: str, device: str = "cpu") -> Bench:
    """A model a few steps into training, so that AdamW has moments. Kernels are single-threaded while it trains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if size in ("toy", "seed"):
            return Bench.of(config_of(size), device)
        shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50} if size == "tiny" else {}
        return gpt2(device, **shape)
    finally:
        torch.set_num_threads(threads)


def case_of(bench: Bench, size: str, verb: str) -> Case:
    """A verb on a bench of that size."""
    model, (contrast, *_) = bench.recipe.model, bench.contrasts
    transformer = size in ("gpt2", "tiny")
    parts = dy.sites.heads(model) if transformer else dy.sites.matrices(model)
    if verb == "attribute_step":
        return Case(bench, verb, parts)
    if verb == "patch_signals":
        hook, by = ("transformer.h.*.attn.c_proj", "pos") if transformer else ("blocks.*.attn.hook_z", "head")
        parts = dy.sites.activations(model, hook, ("layer", by), contrast.base)
    apart = max(1, len(parts) // N_SITES[size])
    return Case(bench, verb, parts[::apart][: N_SITES[size]])


def gpt2(device: str = "cpu", **shape: int) -> Bench:
    """GPT-2 small, 124 million parameters made of a config, and one contrast of 12 tokens."""
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**no_dropout, bos_token_id=0, eos_token_id=0, **shape)
    model = transformers.GPT2LMHeadModel(config).to(device)

    def batch(seed: int) -> Batch:
        draws = torch.Generator().manual_seed(seed)
        tokens, target = (torch.randint(config.vocab_size, (1, n), generator=draws) for n in (12, 1))
        return Batch(tokens=tokens, target_pos=torch.tensor([11]), targets=target[0]).to(device)

    recipe = dy.Recipe(model, loss_of_last_token, lambda p: torch.optim.AdamW(p, lr=1e-4), max_grad_norm=1.0)
    start = Checkpoint.capture(model, recipe.optimizer(model.parameters()))
    state = dy.steps.advance(recipe, start, WARM_STEPS, lambda step: batch(10 + step))
    return Bench(recipe, state, [dy.Contrast(batch(0), batch(1), batch(0))])


def loss_of_last_token(model: nn.Module, batch: Batch) -> Tensor:
    """Mean −log p(target) at each row's scored position, in nats."""
    logits = model(batch.tokens).logits
    return F.cross_entropy(logits[torch.arange(len(logits)), batch.target_pos], batch.targets)
