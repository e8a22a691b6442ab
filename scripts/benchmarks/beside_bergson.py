"""The account's scores of definitions beside Bergson's MAGIC, by what retraining says. A minute a run, one core.

MAGIC differentiates through training itself: the exact derivative of Dt3 − Df4 after 100 steps of X2 by the weight
of each definition in the loss. Its trainer takes the toy as it is, from the run's own checkpoint and moments, with
the run's batches, rates and clipping; the parameters it ends at are compared with ours. Truth, account and other
scores are those of scripts/experiments/account.py, which is asked for what is not there yet.

It wants an environment of its own, with this package and Bergson, without a GPU, torchvision and torchaudio:

    python3 -m venv ../bergson
    ../bergson/bin/pip install -c constraints.txt -e '.[test]' torchopt natsort petname simple-parsing ml_dtypes
    ../bergson/bin/pip install --no-deps bergson==2.5.1
    ../bergson/bin/python scripts/benchmarks/beside_bergson.py runs/default-* --out runs/account

What it finds is kept in --out, so that any environment can print the table again:

    .venv/bin/python scripts/benchmarks/beside_bergson.py runs/default-* --out runs/account
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics import results, steps
from dynamics.batch import Batch
from dynamics.measures import target_logits
from dynamics.tasks import AliasTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.experiments import account
from scripts.shared.difference import difference
from scripts.shared.into_readme import interval, markdown, stamp
from scripts.shared.runs import parser_of_runs, run_key, stored

EPS_ROOT = (1e-17, 1e-12, 1e-8)
"""Added to AdamW's second moment under its root: Bergson's own, which is next to nothing, and smoother ones."""


class Weighted(nn.Module):
    """A model as Bergson trains it: tokens in, the loss out, a mean of the rows by their weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, batch: Batch, example_weight: Tensor) -> Tensor:
        """A scalar."""
        losses = F.cross_entropy(target_logits(self.model, batch), batch.targets, reduction="none")
        return (losses * example_weight).sum() / example_weight.sum()


class Stream:
    """Batches as Bergson asks for them, with one weight for each definition and one for all other rows."""

    def __init__(self, batches: Sequence[Batch], groups: Sequence[Tensor], n_groups: int) -> None:
        self.batches, self.groups = batches, groups
        self.weights = nn.Parameter(torch.ones(n_groups))
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> dict[str, Any]:
        batch = self.batches[place]
        return {
            "input_ids": batch.tokens,
            "batch": batch,
            "example_weight": self.weights[self.groups[place]],
        }

    @property
    def requires_grad(self) -> bool:
        """Whether the weights are differentiated."""
        return self.weights.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weights.requires_grad = value


def magic(task: AliasTask, start: Checkpoint, defined: Sequence[str], eps_root: float) -> xr.Dataset:
    """MAGIC's score of each definition, how far its training ends from ours, and its CPU seconds."""
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer
    from torchopt.pytree import tree_iter, tree_leaves

    recipe, (measure, probe) = task.recipe(), difference(task)
    batches = [task.batch(start.step + i) for i in range(account.RETRAINED)]
    place = {name: i for i, name in enumerate(defined)}
    groups = [
        torch.tensor([place.get(s, len(defined)) for s in task.sources(b, by="integer")]) for b in batches
    ]
    stream = Stream(batches, groups, len(defined) + 1)
    ours = steps.advance(
        recipe, start, start.step + len(batches), lambda step: batches[step - start.step]
    ).parameters

    begin = time.process_time()
    phases = task.config.phases
    rates = torch.tensor([phases.learning_rate(i) for i in range(start.step + len(batches))])
    optimizer = torchopt.adamw(
        lambda count: rates[count], betas=phases.betas, weight_decay=phases.weight_decay, eps_root=eps_root
    )
    toy = task.model()
    toy.load_state_dict(dict(start.parameters), strict=False)
    model = Weighted(toy)
    trainer, state = Trainer.initialize(model, optimizer)
    state = warm(state, start, tree_leaves)
    with tempfile.TemporaryDirectory() as folder:
        norm = phases.max_grad_norm
        state = trainer.train(
            state, stream, save_dir=folder, save_mode="all", inplace=True, max_grad_norm=norm
        )
        ended = {n.removeprefix("model."): p.detach().clone() for n, p in state.params.items()}
        leaves = {n: p.requires_grad_() for n, p in ended.items()}
        asked = measure(partial(torch.func.functional_call, toy, leaves), probe).double().mean()
        slopes = torch.autograd.grad(asked, list(leaves.values()))
        towards = BackwardState(
            {f"model.{n}": g for n, g in zip(leaves, slopes, strict=True)},
            [torch.zeros_like(t) for t in tree_iter(state.opt_state) if t.is_floating_point()],
            torch.zeros_like(stream.weights),
        )
        found = trainer.backward(folder, stream, towards, state, save_mode="all", max_grad_norm=norm)
    apart = max(float((ended[n] - p).abs().max()) for n, p in ours.items())
    return xr.Dataset(
        {
            "MAGIC": ("definition", found.weight_grads[:-1].detach().double().numpy()),
            "end": float(asked),
            "apart": apart,
            "seconds": time.process_time() - begin,
        },
        coords={"definition": list(defined)},
        attrs={"provenance": results.provenance(verb="magic", step=start.step, measure=measure.name)},
    )


def warm(state: Any, start: Checkpoint, leaves: Any) -> Any:
    """Bergson's state with the moments and counts of the checkpoint's AdamW."""
    assert start.optimizer is not None
    kept = {f"model.{name}": state for name, state in start.optimizer.state.items()}

    def of(key: str) -> list[Tensor]:
        return [t.clone() for t in leaves({name: kept[name][key] for name in state.params})]

    adam, *others, schedule = state.opt_state
    adam = adam._replace(mu=of("exp_avg"), nu=of("exp_avg_sq"), count=[t.long() for t in of("step")])
    rates = schedule._replace(count=[torch.tensor(start.step) for _ in schedule.count])
    state.opt_state = (adam, *others, rates)
    return state


def of_run(folder: Path, out: Path) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Linear datamodeling scores of a run, by the name of the score; and what each of MAGIC's took and met."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    run = Trajectory.open(folder)
    task = dy.tasks.aliases.load(run.config)
    start = run.at(task.config.phases.starts["x2"])
    there = out / run_key(run)
    halves = stored(there / "halves.h5", partial(account.without_halves, task, start))
    defined = [str(d) for d in halves["definition"].values]
    scores = {name: halves[name].values for name in ("account", "attribute_examples", "TracIn", "random")}
    met = {}
    for eps_root in EPS_ROOT:
        found = stored(there / f"magic-{eps_root:g}.h5", partial(magic, task, start, defined, eps_root))
        name = f"MAGIC, eps_root {eps_root:g}"
        scores[name] = found["MAGIC"].values
        met[name] = [float(found[n]) for n in ("seconds", "apart")] + [float(abs(found["MAGIC"]).max())]
    kept, end = halves["kept"].values, halves["end"].values
    foretold = {name: kept @ score for name, score in scores.items()}
    foretold["the same under noise"] = halves["end under noise"].values
    return {name: float(scipy.stats.spearmanr(x, end).statistic) for name, x in foretold.items()}, met


def main(arguments: Sequence[str] | None = None) -> None:
    """Score what is not scored yet, and print the table."""
    parser = parser_of_runs(__doc__, "account", "run folders of the default alias study")
    given = parser.parse_args(arguments)
    found = [of_run(folder, given.out) for folder in given.runs]
    head = ["score of definitions", "linear datamodeling score", "CPU s", "parameters apart", "largest score"]
    rows = []
    for name in found[0][0]:
        scores = [scored[name] for scored, _ in found]
        told = interval(scores) if len(scores) > 1 else f"{scores[0]:+.2f}"
        met = [
            f"{np.mean(values):.2g}" for values in zip(*(m[name] for _, m in found if name in m), strict=True)
        ]
        rows.append([name, told, *(met or ["–"] * 3)])
    print("\n".join([*markdown(head, rows), "", f"n = {len(found)}. {stamp(__file__)}"]))


if __name__ == "__main__":
    main()
