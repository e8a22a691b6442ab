"""attribute_examples: divide what one training step did among the rows of its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics.engine.arguments import check_all, check_probe, check_recipe, named, naming
from dynamics.engine.attribution_table import Array, AttributionTable
from dynamics.engine.batch_rows import row_gradients, row_updates, split_rows
from dynamics.engine.exclusive import exclusive
from dynamics.engine.gradient_prefetch import GradientPrefetch
from dynamics.engine.measure_gradients import MeasureGradients
from dynamics.engine.measuring import Measuring
from dynamics.engine.path_integral import Method, Quadrature, StraightPath
from dynamics.engine.progress import progress_bar
from dynamics.engine.runs import Runs, reference_models
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.states import starting_point
from dynamics.steps.update import Steps
from dynamics.steps.worker_threads import worker_threads


@exclusive
def attribute_examples(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    batch: Any,
    probes: Sequence[Contrast],
    measure: Measure | Mapping[str, Measure],
    method: Method = "first_order",
    tolerance: float = 0.01,
    max_nodes: int = 64,
) -> xr.Dataset:
    """How much each row of a training batch contributed to what its step did to a measure.

        A_i = ⟨∇M, θ(g) − θ(g − g_i)⟩        g = Σ g_i, g_i the gradient of row i over the number of rows

    θ(g − g_i) is the optimizer's own step with the row's loss weighing nothing, clipped and with the checkpoint's
    moments: exact, only the measure is linearised. That is what tells this from TracIn, ⟨∇M, −η g_i⟩, which knows
    no optimizer: Adam's moments and its division by √v decide how far a row can move anything. On the alias task
    the ranks of a batch's 64 rows agree with those from replaying the step without each row to .99 (median over
    30 probes), TracIn's to .73-.80 with stored moments and to .35-.52 with a fresh optimizer.

    A row dropped from the batch altogether leaves the others a weight of 1 / (n_rows − 1): without clipping that
    adds one and the same number to all rows of a probe, and leaves their order as it is.

    Args:
        recipe: how a step is taken; its loss must be the mean over the rows of each row's own loss.
        checkpoint: state before the step; None takes the recipe's model as it stands and a new optimizer.
        batch: the training batch, such as `task.batch(step)`: anything whose tensors share their first axis.
        probes: what the measure is evaluated on, length n_examples: the `probe` and `coords` of contrasts, such
            as `task.contrasts()`. Their own batches play no part.
        measure: as `attribute_step`.
        method: "first_order" takes ∇M after the step, θ(g): closest to leaving the row out. "integrated" averages
            it over the path from θ(g) to θ(0), the step with a zero gradient: then ΣA = base − coasted, up to
            `residual`, where rows add up in the optimizer: in SGD without active clipping exactly.
        tolerance, max_nodes: as `attribute_step`.

    Returns:
        `attribution` [example, row], positive where the row raised the measure, n_rows labelled from 0; the
        references `base` (after the step), `untouched`, `coasted` (a zero gradient) [example]; `residual`, ΣA less
        base − coasted, which holds what rows do only together as well as the linearisation; `nodes` as
        `attribute_step`. In the measure's units, with a dim `measure` where several were asked for.

        Memory: two copies of the model for each row.

    Raises:
        ValueError: no probes; the batch cannot be split into rows; their gradients do not add up to the batch's;
            otherwise as `attribute_step`.

    Source: leave-one-out through one optimizer step; TracIn is Pruthi et al. 2020.
    """
    check_recipe("attribute_examples", recipe, checkpoint)
    check_all("attribute_examples", "probes", probes, Contrast)
    for i, probe in enumerate(probes):
        check_probe("attribute_examples", named(probes, i), probe.probe, measure)
    quadrature = Quadrature(method, tolerance, max_nodes)
    state = starting_point(recipe, checkpoint)
    rows = split_rows(batch)
    whole = Contrast(batch, batch)
    paths = ComputePaths("attribute_examples")
    prefetch = GradientPrefetch(recipe, state, [whole], paths)
    runs = Runs(Steps(recipe, state, paths), whole, "attribute_examples", prefetch)
    shares = row_gradients(runs, rows)
    untouched, coasted, base, _ = chain.from_iterable(reference_models(runs))
    moved = row_updates(runs, shares, base)
    models = {"untouched": untouched, "base": base, "coasted": coasted}
    table = AttributionTable(measure, len(probes), len(rows), list(models))
    measuring = Measuring(recipe, state, table.by_name, paths)
    gradients = MeasureGradients(recipe, state, paths)
    trained = [name for name, p in recipe.model.named_parameters() if p.requires_grad]
    with worker_threads(state.parameters), progress_bar("attribute_examples", len(probes), "probe") as bar:
        for i, probe in enumerate(probes):
            name = named(probes, i)
            with naming(name):
                table.evaluate(measuring, i, probe.probe, models)
                path = StraightPath(gradients, base, coasted, trained, probe.probe, name)
                for m, (measure_name, function) in enumerate(table.by_name.items()):
                    change = table.references["coasted"][m, i] - table.references["base"][m, i]
                    mean, table.nodes[m, i] = path.mean_gradient(measure_name, function, change, quadrature)
                    table.attribution[m, i] = _projected(moved, mean, len(rows))
                    table.residual[m, i] = table.attribution[m, i].sum() + change
            bar.update()
    return table.labelled("attribute_examples", state, probes, "row", {"row": list(range(len(rows)))}, paths)


def _projected(moved: Mapping[str, Tensor], onto: Mapping[str, Tensor], n_rows: int) -> Array:
    """⟨onto, what each row moved⟩ in fp64: [n_rows]."""
    parts = [m.reshape(n_rows, -1).double() @ onto[name].flatten().double() for name, m in moved.items()]
    return torch.stack(parts).sum(0).cpu().numpy()
