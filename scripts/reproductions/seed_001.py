"""Activation patching of one's own task in 20 lines (seed 001). About 15 seconds.

A ranked table, a layer x component map. The seed's corruption exchanges the two names of the first clause,
which leaves the answer what it was; the other one lets the other person give.

    dynamics fit --preset ioi --out runs/ioi
    .venv/bin/python scripts/reproductions/seed_001.py runs/ioi
    .venv/bin/python scripts/reproductions/seed_001.py --model gpt2 --n 5
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dynamics as dy
from dynamics.tasks.words import NAMES, PLACES, THINGS

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.reproductions.subjects import draw, hugging_face, parser, sites, trained

HOOKS = {"hook_attn_out": ("layer",), "hook_mlp_out": ("layer",), "attn.hook_z": ("layer", "head")}


@dataclass
class GivesTo:
    """Who is given something: a `PromptDataset`."""

    names: list[str]
    corruption: str
    n: int
    measure = dy.measures.logit_difference

    def _said(self, first: str, second: str, subject: str, i: int) -> str:
        place, thing = PLACES[i % len(PLACES)], THINGS[i % len(THINGS)]
        return f"When {first} and {second} went to the {place}, {subject} gave a {thing} to"

    def target_tokens(self, i: int) -> tuple[str, str]:
        one, other = self.names[2 * i % len(self.names)], self.names[(2 * i + 1) % len(self.names)]
        return f" {one}", f" {other}"

    def pairs(self) -> list[tuple[str, str]]:
        answers = [[name.strip() for name in self.target_tokens(i)] for i in range(self.n)]
        broken = {"order": lambda a, b: (b, a, b), "subject": lambda a, b: (a, b, a)}[self.corruption]
        return [(self._said(a, b, b, i), self._said(*broken(a, b), i)) for i, (a, b) in enumerate(answers)]


def main(argv: Sequence[str] | None = None) -> None:
    given = parser(__doc__, "ioi").parse_args(argv)
    subject = hugging_face(given.model) if given.model else trained(given.run)
    names = list(subject.task.names) if subject.task is not None else NAMES[: 2 * given.n]
    for corruption in ("order", "subject"):
        dataset = GivesTo(names, corruption, given.n)
        contrasts = dy.tasks.prompt_contrasts(dataset, subject.words, subject.prefix)
        chosen = [s for hook, by in HOOKS.items() for s in sites(subject, hook, by, contrasts[0].base)]
        found = dy.patch_activations(subject.recipe, None, contrasts, chosen, dataset.measure)
        print(f"\ncorrupted: {corruption}\n{dy.statistics.table(dy.statistics.summarize(found), 10)}")
        pairwise = dy.statistics.pairwise_recovery(found)
        site = str(found["site"].values[np.abs(found["effect"].mean("example").values).argmax()])
        each = pairwise.sel(site=site)
        print(f"{site}, pair by pair: {float(each.min()):.2f} to {float(each.max()):.2f}")
        print(f"heads: {', '.join(f'L{i}H{j}' for i, j in dy.statistics.top_heads(found, 5))}")
        parts = found.isel(site=found["head"].values < 0)
        heads = found.isel(site=found["head"].values >= 0)
        draw(
            given.out / "001",
            **{f"{corruption}_components": dy.plots.heatmap(parts, x="component")},
            **{f"{corruption}_heads": dy.plots.heatmap(heads)},
        )


if __name__ == "__main__":
    main()
