"""The acronym circuit, letter by letter (seed 003). About a minute.

One letter after another, with the current word corrupted: the residual stream and heads.

    dynamics fit --preset acronyms --out runs/acronyms
    .venv/bin/python scripts/reproductions/seed_003.py runs/acronyms --readme
    .venv/bin/python scripts/reproductions/seed_003.py --model gpt2 --acronyms data/acronyms.txt --n 250
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import dynamics as dy
from dynamics.tasks import acronyms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.reproductions.subjects import draw, hugging_face, parser, sites, trained
from scripts.shared.into_readme import beside


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__, "acronyms")
    arguments.add_argument(
        "--acronyms", type=Path, help="with --model: a file with a line `prompt, acronym` each"
    )
    arguments.add_argument("--readme", action="store_true", help="put the residual stream into the README")
    given = arguments.parse_args(argv)
    if given.model:
        subject = hugging_face(given.model, processed=True)
        triples = acronyms.read(given.acronyms)[: given.n] if given.acronyms else None
        shuffled, current = (
            acronyms.prompts(subject.words, triples, corruption, subject.prefix)
            for corruption in ("words", "current")
        )
    else:
        subject = trained(given.run)
        shuffled, current = (subject.task.contrasts(c, given.n) for c in ("words", "current"))
    like, out = current[0].base, given.out / "003"
    labels = [*subject.prompt(current[0])[:-2], "A1", "A2"]
    labels[-6:-3] = ["C1", "C2", "C3"]

    # the metric clean and with all words shuffled, letter by letter
    start = sites(subject, "hook_resid_pre", ("layer",), like)[:1]
    found = dy.patch_activations(subject.recipe, None, shuffled, start, acronyms.by_letter())
    for letter in found["measure"].values:
        here = found.sel(measure=letter).mean("example")
        print(f"{letter}: clean {float(here['source']):.2f}, all words shuffled {float(here['base']):.2f}")

    # noising: the clean run takes what the corrupted one has
    noising = [contrast.reversed() for contrast in current]
    measure = dy.measures.logit_margin
    resid = dy.patch_activations(
        subject.recipe, None, noising, sites(subject, "hook_resid_pre", ("layer", "pos"), like), measure
    )
    heads = dy.patch_activations(
        subject.recipe, None, noising, sites(subject, "attn.hook_z", ("layer", "head"), like), measure
    )
    for letter in (1, 2, 3):
        own = heads.isel(example=heads["letter"].values == letter)
        summary = dy.statistics.summarize(own)
        print(f"\nletter {letter}, its word corrupted\n{dy.statistics.table(summary, 5)}")
        print(f"top heads: {', '.join(f'L{i}H{j}' for i, j in dy.statistics.top_heads(own, 5))}")
    residual_stream = dy.plots.tiles(resid, facet="letter", x_labels=labels)
    draw(out, residual_stream=residual_stream, heads=dy.plots.tiles(heads, facet="letter", x="head"))
    if given.readme:
        draw(beside(""), acronyms=residual_stream)


if __name__ == "__main__":
    main()
