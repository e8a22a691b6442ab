"""Attribution patching, cell by cell (seed 000). About 3 minutes.

Indirect objects first, then facts.

    dynamics fit --preset ioi --out runs/ioi && dynamics fit --preset facts --out runs/facts
    .venv/bin/python scripts/reproductions/seed_000.py runs/ioi --facts runs/facts
    .venv/bin/python scripts/reproductions/seed_000.py --model gpt2 --n 8 --nodes 8
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr

import dynamics as dy
from dynamics.recipe import Contrast
from dynamics.tasks import facts, ioi

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.reproductions.subjects import Subject, draw, hugging_face, parser, sites, trained
from scripts.shared.into_readme import conclude, interval, stamp

FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "residual stream": {"hook_resid_pre": ("layer", "pos")},
    "layer outputs": {"hook_attn_out": ("layer", "pos"), "hook_mlp_out": ("layer", "pos")},
    "head outputs": {"attn.hook_z": ("layer", "head")},
    "q, k, v": {f"attn.hook_{part}": ("layer", "head") for part in "qkv"},
    "patterns": {"attn.hook_pattern": ("layer", "head")},
}
METRIC = dy.measures.logit_difference


def baselines(subject: Subject, contrasts: list[Contrast]) -> None:
    """The metric clean and corrupted, and what one run's cache holds."""
    for side in ("source", "base"):
        batches = [getattr(contrast, side) for contrast in contrasts]
        with torch.no_grad():
            values = [float(METRIC(subject.model, batch).mean()) for batch in batches]
        kept = dy.cache(
            dy.Recipe(subject.model, lambda model, batch: METRIC(model, batch).mean()), None, batches[0]
        )
        print(
            f"{'clean' if side == 'source' else 'corrupted'} logit difference {interval(values)}; cached "
            f"{len(kept.activations)} activations, {len(kept.signals)} gradients"
        )


def attention(subject: Subject, contrasts: list[Contrast], out: Path) -> None:
    """Attention attribution, ∇M ⊙ pattern on the clean prompts: one prompt and the mean, by signed head."""
    clean = [contrast.reversed() for contrast in contrasts]
    by = ("layer", "head", "pos", "src")
    found = dy.attribute_activations(
        subject.recipe, None, clean, sites(subject, "attn.hook_pattern", by, clean[0].base), METRIC, values="zero"
    )  # fmt: skip
    found["attribution"] *= -1
    tokens = subject.prompt(contrasts[0])
    draw(
        out,
        attention_of_one_prompt=dy.plots.signed_heads(found.isel(example=[0]), tokens),
        attention=dy.plots.signed_heads(found, tokens),
    )


def agreement(attributed: xr.Dataset, patched: xr.Dataset) -> str:
    """Spearman's ρ of the means and of each prompt, and how large the attributions are beside the effects."""
    rho = dy.statistics.rank_correlation(attributed, patched)
    sizes = [
        float(abs(found.mean("example")).sum()) for found in (attributed["attribution"], patched["effect"])
    ]
    return (
        f"{float(rho['of_means']):.2f} | {interval(rho['per_example'].dropna('example'))} "
        f"| {sizes[0] / sizes[1]:.2f}"
    )


def families(subject: Subject, contrasts: list[Contrast], nodes: int, out: Path) -> list[str]:
    """Every family by attribution, first order and integrated, and by patching; how far they agree."""
    rows = [
        "| sites | n | first order: ρ of means | ρ by prompt | size | integrated: ρ of means | ρ by prompt | size |"
    ]
    rows.append("|---" * 8 + "|")
    for name, hooks in FAMILIES.items():
        chosen = [s for hook, by in hooks.items() for s in sites(subject, hook, by, contrasts[0].base)]
        call = (subject.recipe, None, contrasts, chosen, METRIC)
        patched = dy.patch_activations(*call)
        first = dy.attribute_activations(*call)
        integrated = dy.attribute_activations(*call, method="integrated", max_nodes=nodes)
        print(f"\n{name}\n{dy.statistics.table(dy.statistics.summarize(patched), 5)}")
        both = [agreement(found, patched) for found in (first, integrated)]
        rows.append(f"| {name} | {len(chosen)} | {both[0]} | {both[1]} |")
        labels = subject.prompt(contrasts[0]) if "pos" in first.coords else []
        where = {"x": "pos" if labels else "head", "x_labels": labels}
        stem = name.replace(", ", "").replace(" ", "_")
        draw(
            out,
            **{
                f"{stem}_attribution": dy.plots.tiles(first, "attribution", **where),
                f"{stem}_patching": dy.plots.tiles(patched, **where),
                f"{stem}_scatter": dy.plots.attribution_against_patching(first, patched),
            },
        )
    return rows


def factual(subject: Subject, out: Path) -> None:
    """Facts corrupted by another subject or by a word that says nothing."""
    for corruption in ("subject", "words"):
        if subject.task is not None:
            contrasts = subject.task.contrasts(corruption)
            contrasts = [c for c in contrasts if c.coords["template"] == contrasts[0].coords["template"]]
        else:
            contrasts = facts.prompts(subject.words, corruption=corruption, prefix=subject.prefix)
        answer = subject.words.decode([int(contrasts[0].source.targets[0])])
        for side in ("source", "base"):
            text = subject.words.decode(getattr(contrasts[0], side).tokens[0].tolist())
            print(f"\n{text}\n{dy.tasks.top_answers(subject.model, text, subject.words, answer).to_string()}")
        chosen = sites(subject, "hook_resid_pre", ("layer", "pos"), contrasts[0].base)
        found = dy.patch_activations(subject.recipe, None, contrasts, chosen, METRIC)
        print(f"\nfacts, {corruption}\n{dy.statistics.table(dy.statistics.summarize(found), 5)}")
        draw(out, **{f"facts_{corruption}": dy.plots.tiles(found, x_labels=subject.prompt(contrasts[0]))})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__, "ioi")
    arguments.add_argument("--facts", type=Path, default=Path("runs/facts"), help="a run of the task facts")
    arguments.add_argument("--readme", action="store_true", help="write the table into the README")
    arguments.add_argument("--nodes", type=int, default=64, help="gradients at most, where integrated")
    given = arguments.parse_args(argv)
    subject = hugging_face(given.model) if given.model else trained(given.run)
    many = 20 * (given.n + 2)  # one in ten is in the first template and has the one who gives second
    if subject.task is not None:
        contrasts = subject.task.contrasts("subject", many)
    else:
        contrasts = ioi.prompts(subject.words, many, "subject", subject.prefix)
    alike = [c for c in contrasts if c.coords["template"] == 0 and c.coords["order"] == "ABBA"][: given.n]
    out = given.out / "000"
    baselines(subject, alike)
    attention(subject, alike, out)
    rows = families(subject, alike, given.nodes, out)
    note = (
        "Spearman's ρ over sites with patching, of the means over prompts and prompt by prompt (mean [95 %]); "
        f"size: Σ|attribution| / Σ|effect|. {len(alike)} prompts. "
    )
    text = "\n".join([*rows, "", note + stamp(__file__)])
    conclude(given, "attribution", text)
    factual(subject if given.model else trained(given.facts), out)


if __name__ == "__main__":
    main()
