"""The seed's table of recoveries at its own size. About 3 minutes once the run is trained.

    .venv/bin/dynamics fit --preset seed --out runs/seed
    .venv/bin/python scripts/reproductions/seed_size.py --run runs/seed --readme

Nested parts of the model and those of block 0. The seed examined one integer, whose answers had changed most.
Beside it here stand all held-out aliases.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import nn

import dynamics as dy
from checkpoints import Checkpoint, Trajectory

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared import runs
from scripts.shared.into_readme import conclude, stamp

THEIRS = {
    "embeddings": 0.092,
    "+ block 0": 0.886,
    "+ block 1": 1.022,
    "block 0": 0.660,
    "attention 0": 0.564,
    "MLP 0": 0.061,
    "QK 0": -1e-5,
    "OV 0": 0.564,
    "W_O 0": 0.071,
    "W_V 0": 0.415,
}
"""The seed's recoveries, for the alias of 71."""


def parts(model: nn.Module) -> list[dy.sites.Site]:
    """The rows of the table; embeddings are those of tokens and positions."""
    first, second = "blocks.0.", "blocks.1."
    embeddings = ["embed.*", "pos_embed.*"]
    patterns = {
        "embeddings": embeddings,
        "+ block 0": [*embeddings, f"{first}*"],
        "+ block 1": [*embeddings, f"{first}*", f"{second}*"],
        "block 0": [f"{first}*"],
        "attention 0": [f"{first}attn.*"],
        "MLP 0": [f"{first}mlp.*"],
        "QK 0": [f"{first}attn.?_Q", f"{first}attn.?_K"],
        "OV 0": [f"{first}attn.?_V", f"{first}attn.?_O"],
        "W_O 0": [f"{first}attn.W_O"],
        "W_V 0": [f"{first}attn.W_V"],
    }
    return dy.sites.matching(model, patterns)


def found(run: Trajectory, step: int, out: Path) -> dict[str, xr.Dataset]:
    """`patch_gradients` of all held-out aliases, with a new optimizer and with the run's own; kept under `out`."""
    task = dy.tasks.load(run.config)
    recipe = task.recipe()
    state = run.at(task.config.phases.starts["x2"] + step)
    states: dict[str, Checkpoint] = {"fresh": state.with_fresh_optimizer(), "stored": state}
    sites, measure = parts(recipe.model), dy.measures.correct_logit
    return {
        name: runs.stored(
            out / f"{runs.run_key(run)}-{step}-{name}.h5",
            lambda at=at: dy.patch_gradients(recipe, at, task.contrasts(), sites, measure),  # type: ignore[misc]
        )
        for name, at in states.items()
    }


def most_changed(run: Trajectory) -> int:
    """The held-out alias whose correct logit rose most over X2, as the seed chose its integer."""
    task = dy.tasks.load(run.config)
    model, answers = task.recipe().model.eval(), []
    for name in ("x2", "end"):
        run.at(task.config.phases.starts[name]).restore(model)
        with torch.no_grad():
            answers.append(
                [float(dy.measures.correct_logit(model, c.probe).mean()) for c in task.contrasts()]
            )
    return int(np.argmax(np.subtract(answers[1], answers[0])))


def table(run: Trajectory, data: dict[str, xr.Dataset], step: int) -> str:
    """Recovery of each part: the seed's, one alias's, all aliases'."""
    one = most_changed(run)
    label = str(data["fresh"]["example"].values[one])
    lines = [
        "| gradients exchanged | recovery, the seed | recovery, one alias, fresh | recovery, one alias, stored "
        "| effect in logits, all aliases, fresh | effect in logits, all aliases, stored |",
        "|---|---|---|---|---|---|",
    ]
    for i, (name, theirs) in enumerate(THEIRS.items()):
        cells = []
        for dataset in data.values():
            effect, gap = dataset["effect"].values, (dataset["source"] - dataset["base"]).values
            mean, share = dy.statistics.mean_interval(effect[:, i]), dy.statistics.recovery(effect[:, i], gap)
            text = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*map(float, mean))
            if np.isfinite(share.low):
                text += " = {:.2f} [{:.2f}, {:.2f}]".format(*map(float, share))
            cells.append((effect[one, i] / gap[one], text))
        alone = " | ".join(f"{single:.3f}" for single, _ in cells)
        together = " | ".join(text for _, text in cells)
        lines.append(f"| {name} | {theirs:.3f} | {alone} | {together} |")
    gaps = "; ".join(
        name
        + ": before {:.2f}, after the reliable step {:.2f}, after the unreliable {:.2f}".format(
            *(float(d[key].values[one]) for key in ("untouched", "source", "base"))
        )
        + ", all: gap {:+.2f} [{:+.2f}, {:+.2f}]".format(
            *map(float, dy.statistics.mean_interval((d["source"] - d["base"]).values))
        )
        for name, d in data.items()
    )
    return "\n".join(
        [
            *lines,
            "",
            "Recovery of the gap; of all aliases the mean effect in logits [95 %], and its recovery where their "
            f"gap is distinguishable from zero. X2 step {step}, correct logit, {data['fresh'].sizes['example']} "
            f"aliases; the one whose correct logit rose most over X2 is {label}. Logits, {gaps}. {stamp(__file__)}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/seed"))
    parser.add_argument(
        "--x2_step", type=int, default=0, help="a stored step within X2; the seed took the first"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/seed-size"))
    given = parser.parse_args(argv)
    warnings.filterwarnings("error")
    torch.set_num_threads(given.threads)
    run = Trajectory.open(given.run)
    conclude(given, "seed", table(run, found(run, given.x2_step, given.out), given.x2_step))


if __name__ == "__main__":
    main()
