"""A run with everything that a report shows, its numbers drawn at random: nothing is trained for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from checkpoints import Checkpoint, TrajectoryWriter
from dynamics import results, studies
from tests.zoo.cli_runs import ALIASES

STEPS = (0, 3, 7, 10, 57)
"""Stored checkpoints; X1 begins at step 3, X2 at 7."""

REPLAYED = (7, 10, 57)
SETS = ("DtQ1", "DfQ2", "Dt3", "Df4", "heldout")
EXAMPLES: dict[str, list[Any]] = {
    "example": ["alias 1", "alias 2", "alias 5", "alias 6"],
    "integer": [1, 2, 5, 6],
    "set": ["Dt3", "Dt3", "Df4", "Df4"],
}
SITES: dict[str, list[Any]] = {
    "site": ["attn 0", "mlp 0", "L0H0", "L0H1", "L1H0", "L1H1", *(f"placebo {i}" for i in range(3))],
    "level": ["components"] * 2 + ["heads"] * 4 + ["placebo"] * 3,
    "component": ["attn", "mlp"] + ["head"] * 4 + ["attn 0"] * 3,
    "layer": [0, 0, 0, 0, 1, 1, 0, 0, 0],
    "head": [None, None, 0, 1, 0, 1, None, None, None],
}
N_SITES = len(SITES["site"])


def patched(seed: int, verb: str = "patch_gradients", n_sites: int = N_SITES) -> xr.Dataset:
    """Effects of sites at three steps, in two optimizer states and two measures."""
    draw = np.random.default_rng(seed)
    sites = {name: column[:n_sites] for name, column in SITES.items()}

    def one(step: int) -> xr.Dataset:
        found = draw.normal(0.1, 0.2, size=(2, 4, n_sites))
        reference = {"base": draw.normal(size=(2, 4)), "source": 2 + draw.normal(size=(2, 4))}
        facts = results.provenance(
            verb=verb, steps=list(REPLAYED), optimizers=["stored", "fresh"], measures=["correct_logit"]
        )
        measures, units = ["correct_logit", "correct_log_prob"], ["logit", "nat"]
        if verb.startswith("attribute"):
            return results.attributions(
                found, None, np.ones((2, 4)), reference, EXAMPLES, "site", sites, measures, units, facts
            )
        return results.effects(
            found + reference["base"][..., None], reference, EXAMPLES, sites, measures, units, facts
        )

    def state() -> xr.Dataset:
        return results.concat([one(step) for step in REPLAYED], "step", list(REPLAYED))

    return results.concat([state(), state()], "optimizer", ["stored", "fresh"])


def transferred(seed: int) -> xr.Dataset:
    """Every checkpoint of REPLAYED into every one, a measure."""
    found = [
        patched(seed + i, "patch_parameters", 6).isel(optimizer=0, measure=[0], drop=True) for i in range(2)
    ]
    joined = results.concat(found, "source_step", [7, 57])
    facts = results.provenance(verb="patch_parameters", steps=list(REPLAYED), source_steps=[7, 57])
    return joined.assign_attrs(provenance=facts)


def along_training(draw: np.random.Generator) -> dict[str, xr.Dataset]:
    """What `dynamics compare --every` keeps."""
    score = {
        "accuracy": ("share of rows answered right", "share"),
        "correct_logit": ("mean logit of the target", "logit"),
    }

    def scored(labels: list[str], coords: dict[str, Any]) -> xr.Dataset:
        variables = {
            name: (("step", "example"), draw.uniform(size=(5, len(labels))), {"long_name": w, "units": u})
            for name, (w, u) in score.items()
        }
        return xr.Dataset(variables, {"step": list(STEPS), "example": labels, **coords})

    coords = {name: ("example", EXAMPLES[name]) for name in ("integer", "set")}
    sites = results.coordinates({name: column[:6] for name, column in SITES.items()}, "site")
    moved = ("step", "site"), draw.uniform(size=(5, 6)), {"long_name": "‖Δθ‖ / ‖θ‖", "units": "1"}
    relation = ("step", "example", "site"), draw.normal(size=(5, 4, 6)), {"units": "1"}
    return {
        "scores": scored(list(SETS), {}),
        "aliases": scored(EXAMPLES["example"], coords),
        "weights": xr.Dataset({"relative": moved}, {"step": list(STEPS), **sites}),
        "alignment": xr.Dataset(
            dict.fromkeys(("own", "within", "across"), relation),
            {"step": list(STEPS), "example": EXAMPLES["example"], **coords, **sites},
        ),
    }


def accounted(draw: np.random.Generator) -> xr.Dataset:
    """An account of X2 by each alias's definitions, ten entries."""
    sources = [*(f"definition of alias {i}" for i in EXAMPLES["integer"]), "questions", "before", "decay"]
    written = draw.normal(size=(1, 10, 7, 6, 2)) * (np.arange(10) > 0)[:, None, None, None]
    value = written.sum((2, 3)).cumsum(1) + draw.normal(size=2)
    return results.account(
        written,
        value,
        np.zeros((1, 10, 2)),
        np.ones((1, 10, 2), dtype=np.int64),
        list(range(7, 17)),
        sources,
        {"example": ["Dt3", "Df4"]},
        {name: column[:6] for name, column in SITES.items()},
        ["correct_logit"],
        ["logit"],
        partition=True,
        provenance=results.provenance(verb="attribute_training", measures=["correct_logit"]),
    )


def datasets(seed: int) -> dict[str, xr.Dataset]:
    """The results of a run, by the names of their files below RUN/results."""
    draw = np.random.default_rng(seed)
    checks = [studies.Check(f"check {i}", f"+{i}.0 logit", "holds") for i in range(10)]
    compared = {f"compare-every-5-0a1b2c3d/{name}": found for name, found in along_training(draw).items()}
    return {
        "patch_gradients": patched(seed),
        "sweep/attribute_step-1": patched(seed + 1, "attribute_step", 6),
        "transfer/patch_parameters-1": transferred(seed + 2),
        "account/account-7-17-components-integers": accounted(draw),
        "checks-attn-0": studies.as_dataset(checks, "attn 0", "X2 step 3, fresh optimizer"),
        "odd": xr.Dataset({"odd": ("other", np.arange(3.0))}),
        **compared,
    }


def metrics(seed: int) -> str:
    """Curves as metrics.csv has them: the loss at every row, accuracies at every other."""
    draw = np.random.default_rng(seed)
    rows = ["step," + ",".join(f"{name}_accuracy" for name in SETS) + ",train_loss"]
    for i, step in enumerate((0, 3, 5, 7, 12, 20, 31, 40, 57)):
        late = [f"{float(step > 10) * 0.8 + 0.1 * draw.uniform()}" for _ in SETS]
        rows.append(f"{step}," + ",".join(late if i % 4 != 3 else [""] * len(SETS)) + ",1.5")
    return "\n".join(rows) + "\n"


def make(folder: Path, seed: int = 0) -> Path:
    """A run of aliases whose checkpoints are of a model of one parameter."""
    model = nn.Linear(1, 1, bias=False)
    config = ALIASES.to_dict() | {"seed": seed}
    with TrajectoryWriter.create(folder, config, {"date": "2026-01-01"}) as writer:
        for step in STEPS:
            writer.append(Checkpoint.capture(model, step=step))
        writer.write_file("metrics.csv", metrics(seed).encode())
    for name, dataset in datasets(seed).items():
        results.save(dataset, folder / "results" / f"{name}.h5")
    return folder


def make_own(folder: Path) -> Path:
    """A loop of one's own: two checkpoints, a config that names no task, and one saved result."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with TrajectoryWriter.create(folder, {"lr": 0.1}) as writer:
        for step in (0, 4):
            writer.append(Checkpoint.capture(model, step=step))
    effects = results.effects(
        torch.arange(6.0, dtype=torch.float64).reshape(3, 2).numpy(),
        {"base": np.zeros(3), "source": np.ones(3)},
        {"example": ["one", "two", "three"]},
        {"site": ["encoder", "head"]},
        None,
        "nat",
        "{}",
    )
    results.save(effects, folder / "results" / "mine.h5")
    return folder
