"""Interchange interventions on a fact (seed 004). About half a minute.

MLP outputs and attention inputs are exchanged, by layer and position.

    dynamics fit --preset facts --out runs/facts
    .venv/bin/python scripts/reproductions/seed_004.py runs/facts
    .venv/bin/python scripts/reproductions/seed_004.py --model gpt2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import dynamics as dy
from dynamics.tasks.datasets import prompt_contrasts
from dynamics.tasks.facts import Fact

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.reproductions.subjects import draw, hugging_face, parser, sites, trained

SITES = ("ln1.hook_normalized", "hook_mlp_out")


class Capitals:
    """One fact with another subject's prompt as its base: a `PromptDataset`."""

    measure = dy.measures.probability

    def __init__(self, base: Fact, source: Fact) -> None:
        self.base, self.source = base, source

    def pairs(self) -> list[tuple[str, str]]:
        return [(self.source.said(0), self.base.said(0))]

    def target_tokens(self, pair: int) -> tuple[str, str]:
        return f" {self.source.answer}", f" {self.base.answer}"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__, "facts")
    arguments.add_argument("--base", default="Spain")
    arguments.add_argument("--source", default="Italy")
    given = arguments.parse_args(argv)
    subject = hugging_face(given.model, bos=False) if given.model else trained(given.run)
    facts = [Fact(given.base, "capital"), Fact(given.source, "capital")]
    (contrast,) = prompt_contrasts(Capitals(*facts), subject.words)
    for fact in facts:
        print(f"\n{fact.said(0)}")
        print(dy.tasks.top_answers(subject.model, fact.said(0), subject.words, f" {fact.answer}").to_string())
    chosen = [s for hook in SITES for s in sites(subject, hook, ("layer", "pos"), contrast.base)]
    batch = contrast.base
    tokens = {facts[0].answer: int(batch.distractors[0, 0]), facts[1].answer: int(batch.targets[0])}  # type: ignore[index]
    found = dy.interchange(subject.recipe, None, [contrast], chosen, tokens)
    frame = dy.results.tidy(found)
    answer, alone = facts[1].answer, found["base"].sel(measure=facts[1].answer).item()
    moved = frame[frame["measure"] == answer].sort_values("patched", ascending=False)
    print(f"\nprobability of {answer} with one site exchanged; {alone:.3g} with none")
    print(moved[["site", "patched"]].head(8).to_string(index=False))
    last = found.isel(site=found["pos"].values == batch.tokens.shape[1] - 1)
    draw(
        given.out / "004",
        tiles=dy.plots.tiles(found, "patched", x_labels=subject.prompt(contrast, "base")),
        bars=dy.plots.bars(last),
    )
    frame.to_csv(given.out / "004" / "interchange.csv", index=False)


if __name__ == "__main__":
    main()
