"""The verbs on a user's plain nn.Module beside the obvious loop, and what a call costs at least. About a minute.

    .venv/bin/python scripts/benchmarks/plain_module.py --readme

Rows interleave the loop of `seed_loop.py` and the verb on identical batches, as in `patching_speed.py`. The network
is the toy written with nn.Linear, with a loss and a measure of its user's own.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dynamics as dy
from checkpoints import Checkpoint
from dynamics.config import StudyConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.benchmarks.patching_speed import (
    WARM_STEPS,
    Bench,
    Row,
    compared,
    config_of,
    ours,
    timed,
)
from scripts.shared import runs
from scripts.shared.into_readme import conclude, markdown, stamp

FIXED_MS = 12
"""Milliseconds that a call for one contrast and one site of the toy shall take."""


class Block(nn.Module):
    """Causal attention and an MLP, as one writes them without a library."""

    def __init__(self, width: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, pos, width] -> [rows, pos, width]."""
        normed = self.ln1(x)
        q, k, v = (
            part(normed).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.relu(self.up(self.ln2(x))))


class PlainTransformer(nn.Module):
    """Two blocks between embeddings and an unembedding: 38 tensors."""

    def __init__(self, n_tokens: int, n_pos: int, width: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(n_tokens, width), nn.Embedding(n_pos, width)
        self.blocks = nn.ModuleList(Block(width, n_heads, hidden) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_tokens)

    def forward(self, ids: Tensor) -> Tensor:
        """[rows, pos] -> logits [rows, pos, n_tokens]."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def users_loss(model: nn.Module, batch: dy.Batch) -> Tensor:
    """Cross entropy where a row is scored."""
    logits = model(batch.tokens)
    return F.cross_entropy(logits[torch.arange(len(logits)), batch.target_pos], batch.targets)


def users_measure(model: nn.Module, batch: dy.Batch) -> Tensor:
    """The right answer's logit: [rows]."""
    logits = model(batch.tokens)
    return logits[torch.arange(len(logits)), batch.target_pos, batch.targets]


def plain_bench(config: StudyConfig) -> Bench:
    """The batches, the optimizer and the size of a config's toy, the network a plain nn.Module's."""
    task, size = dy.tasks.AliasTask(config), config.model
    recipe = task.recipe()
    n_tokens, n_pos = (recipe.model.get_parameter(n).shape[0] for n in ("embed.W_E", "pos_embed.W_pos"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PlainTransformer(n_tokens, n_pos, size.d_model, size.n_heads, size.d_mlp)
    recipe = replace(recipe, model=model, loss=users_loss)
    optimizer = recipe.optimizer(model.parameters())
    first = config.phases.starts["x2"]
    start = Checkpoint.capture(model, optimizer, recipe.scheduler(optimizer), first)
    state = dy.steps.advance(recipe, start, first + WARM_STEPS, task.batch)
    return Bench(recipe, state, list(task.contrasts()), users_measure)


def plain_rows(bench: Bench) -> list[Row]:
    """What is compared on it: all tensors, all neurons."""
    model, first = bench.recipe.model, bench.contrasts[:1]
    tensors = dy.sites.parameters(model)
    neurons = [
        dy.sites.Site(
            f"L{layer}N{i}",
            {
                f"blocks.{layer}.up.weight": (i,),
                f"blocks.{layer}.up.bias": (i,),
                f"blocks.{layer}.down.weight": (slice(None), i),
            },
        )
        for layer, block in enumerate(model.blocks)
        for i in range(block.up.out_features)
    ]
    return [
        Row("`patch_gradients`, stored AdamW", "patch_gradients", bench.state, first, tensors, {"plain": 6}),
        Row("`patch_updates`", "patch_updates", bench.state, first, tensors, {"plain": 12}),
        Row("`attribute_step`, all tensors", "attribute_step", bench.state, first, tensors, {"plain": 8}),
        Row("`attribute_step`, all neurons", "attribute_step", bench.state, first, neurons, {"plain": 100}),
    ]


def fixed_ms(repeats: int) -> float:
    """Milliseconds of a call on the toy for one contrast and one site."""
    bench, verb = Bench.of(config_of("toy")), "patch_gradients"
    first = bench.contrasts[:1]
    row = Row("one site", verb, bench.state, first, dy.sites.parameters(bench.recipe.model)[:1], {})
    ours(bench, row)
    return 1e3 * statistics.median(timed(lambda: ours(bench, row))[0] for _ in range(4 * repeats))


def measure(repeats: int, threads: int) -> list[dict[str, Any]]:
    """All rows with some threads."""
    torch.set_num_threads(threads)
    bench, facts = plain_bench(config_of("toy")), {"threads": threads}
    found = [facts | compared(bench, row, "plain", repeats) for row in tqdm(plain_rows(bench), unit="row")]
    one = {"row": "toy: `patch_gradients`, one contrast, one site", "ours_ms": fixed_ms(repeats)}
    return [*found, facts | one]


def table(found: Sequence[dict[str, Any]], repeats: int) -> str:
    """Ratios beside goals."""
    lines = []
    for row in found:
        cells = [row["row"], str(row["threads"])]
        if "loop_ms" in row:
            ratio = f"{row['loop_ms'] / row['ours_ms']:.1f}x"
            cells += [ratio, f"{row['goal']}x", f"{row['ours_ms']:.3g} of {row['loop_ms']:.3g}"]
            cells += [f"{row['agreement']:.1g}"]
        else:
            cells += [f"{row['ours_ms']:.1f} ms", f"{FIXED_MS} ms", "–", "–"]
        lines.append(cells)
    head = ["plain nn.Module 2 x 128", "threads", "found", "goal", "ms a site, of the loop's", "agreement"]
    note = (
        f"Medians of {repeats} interleaved repeats; one thread in its own seconds, several by the clock. "
        "Agreement: the largest difference beside the measure; of attributions, Spearman with exact exchanges. "
        f"{stamp(__file__)}"
    )
    return "\n".join([*markdown(head, lines), "", note])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say it."""
    parser = runs.parser(__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("runs/plain-module.json"))
    given = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    found = [row for threads in given.threads for row in measure(given.repeats, threads)]
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=1))
    conclude(given, "plain-module", table(found, given.repeats))


if __name__ == "__main__":
    main()
