"""The verbs on a Hugging Face model of GPT-2 small's size. About half a minute, 5 GB of memory.

Random weights, no download. One contrast of two prompts that differ in one token; heads, one layer's backward
signal, and the memory it takes.

    .venv/bin/python scripts/examples/hugging_face.py
    .venv/bin/python scripts/examples/hugging_face.py --layers 2 --width 64      # in miniature
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import dynamics as dy


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    """Training loss of a language model: mean cross-entropy of each next token."""
    logits = model(tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def peak() -> float:
    """Peak memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {"n_layer": given.layers, "n_embd": given.width, "n_head": given.width // 64 or 1}
    model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    recipe = dy.Recipe(model, next_token, partial(torch.optim.AdamW, lr=1e-5), max_grad_norm=1.0)
    base = torch.randint(50257, (1, 16))
    source = base.clone()
    source[0, 3] = 11
    pair = dy.Contrast(base, source, probe=base)
    heads = [s for s in dy.sites.heads(model) if s.coords["layer"] == given.layers - 1][:4]
    signals = dy.sites.activations(model, f"transformer.h.{given.layers - 1}.mlp")
    size = sum(p.nbytes for p in model.parameters()) / 2**30
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {size:.2f} GB")
    print(f"{'model loaded':>45}: peak {peak():.1f} GB")
    work: dict[str, Callable[[], xr.Dataset]] = {
        "patch_signals, one layer's MLP output": lambda: dy.patch_signals(
            recipe, None, [pair], signals, next_token
        ),
        "patch_gradients, 4 heads": lambda: dy.patch_gradients(recipe, None, [pair], heads, next_token),
        "patch_updates, 4 heads": lambda: dy.patch_updates(recipe, None, [pair], heads, next_token),
    }
    for name, call in work.items():
        began = time.perf_counter()
        effects = call()
        print(f"{name:>45}: {time.perf_counter() - began:5.1f} s, peak {peak():.1f} GB")
        print(
            "  "
            + "  ".join(
                f"{s}: {v:+.2e}" for s, v in zip(effects.site.values, effects.effect.values[0], strict=True)
            )
        )


if __name__ == "__main__":
    main()
