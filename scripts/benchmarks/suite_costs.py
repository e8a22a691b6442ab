"""What one study of the Pythia suite would cost: hours of one GPU and memory, by verb. A few seconds.

    .venv/bin/python scripts/benchmarks/suite_costs.py --readme

Arithmetic: nothing is run. A verb's operations and the bytes it moves are counted (below) and divided by what
a GPU is sold to do, times the share of that which the toolkit reaches on a CPU (`patching_speed.py`: floor
over achieved).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared import runs
from scripts.shared.into_readme import conclude, stamp

CHECKPOINTS = 154
CONTRASTS = 30
BATCH_TOKENS = 32
"""Of one definition: what the gradient is taken of."""
PROBE_TOKENS = 12 * 16
"""Of twelve questions: what the measure reads."""
FLOPS, BANDWIDTH = 19.5e12, 2.0e12
"""Of an A100 80 GB in fp32 without tensor cores, from NVIDIA's data sheet: operations and bytes a second."""


@dataclass(frozen=True)
class Model:
    """One of the suite (Biderman et al. 2023, table 1)."""

    name: str
    parameters: float
    n_layers: int
    n_heads: int

    @property
    def sites(self) -> int:
        """Every head and every MLP, embedding and unembedding."""
        return self.n_layers * (self.n_heads + 1) + 2


SUITE = [
    Model("70M", 70.4e6, 6, 8),
    Model("410M", 405e6, 24, 16),
    Model("2.8B", 2.78e9, 32, 32),
    Model("12B", 11.8e9, 36, 40),
]


def seconds(model: Model, verb: str, efficiency: float) -> float:
    """Of one contrast at one checkpoint. Forward is 2 operations a parameter and token, with backward 6."""
    p = model.parameters
    gradients, forward = 2 * 6 * p * BATCH_TOKENS, 2 * p * PROBE_TOKENS
    step = 28 * p  # read θ, g and both moments; write θ', fp32, once more with the copy that is measured
    operations, moved = {
        "patch_gradients": (gradients + (4 + model.sites) * forward, (3 + model.sites) * step),
        "patch_updates": (gradients + (4 + model.sites) * forward, 3 * step + model.sites * 4 * p),
        "attribute_step, integrated": (gradients + 4 * forward + 8 * 3 * forward, 3 * step + 8 * 24 * p),
        "attribute_step, first order": (gradients + 4 * forward + 3 * forward, 3 * step + 24 * p),
    }[verb]
    return (operations / FLOPS + moved / BANDWIDTH) / efficiency


MEMORY = {
    "patch_gradients": 5,
    "patch_updates": 5,
    "attribute_step, integrated": 8,
    "attribute_step, first order": 8,
}
"""Copies of the parameters held, in fp32: θ, two gradients or updates, the base step and the one measured; for
attribution Δ and the mean gradient in fp64 as well. A new optimizer: the suite has no moments."""


def table(efficiency: float) -> str:
    """Hours and gigabytes."""
    lines = [
        "| | " + " | ".join(f"{m.name}, {m.sites} sites" for m in SUITE) + " |",
        "|" + "---|" * (len(SUITE) + 1),
    ]
    for verb, copies in MEMORY.items():
        cells = []
        for model in SUITE:
            hours = CHECKPOINTS * CONTRASTS * seconds(model, verb, efficiency) / 3600
            cells.append(f"{hours:.2g} h, {copies * 4 * model.parameters / 1e9:.2g} GB")
        lines.append(
            f"| `{verb.replace(', ', '`, ')}{'' if ', ' in verb else '`'} | " + " | ".join(cells) + " |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{CHECKPOINTS} checkpoints x {CONTRASTS} contrasts, definitions of {BATCH_TOKENS} tokens, probes of "
            f"{PROBE_TOKENS}; one A100 80 GB in fp32 at {100 * efficiency:.0f} % of its data sheet, the share "
            "reached here on a CPU. Arithmetic, not a measurement; loading checkpoints is left out. "
            f"{stamp(__file__)}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--benchmark", type=Path, default=Path("runs/patching-speed.json"))
    given = parser.parse_args(argv)
    tables = json.loads(given.benchmark.read_text())["tables"]
    largest = [of_size for of_size in tables if of_size["device"] != "GPU"][-1]
    updates = next(row for row in largest["rows"] if "patch_updates" in row["row"])
    conclude(given, "suite", table(largest["floor_ms"] / updates["ours_ms"]))


if __name__ == "__main__":
    main()
