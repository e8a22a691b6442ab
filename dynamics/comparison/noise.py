"""The noise floor: how far an answer moves for no reason but that training is chaotic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import xarray as xr

from checkpoints import Checkpoint
from dynamics import results
from dynamics.config.checks import require
from dynamics.randomness import generator

SCALE = 1e-6


def under_noise(
    ask: Callable[[Checkpoint], xr.Dataset], checkpoint: Checkpoint, draws: int = 8, scale: float = SCALE
) -> xr.Dataset:
    """Ask the same question from perturbed copies of a checkpoint, as samples of the answer's noise floor.

        floor = dy.comparison.under_noise(
            lambda start: dy.patch_window(recipe, start, contrasts, sites, measure), checkpoint
        )
        floor["effect"].std("noise")

    An effect over many training steps that is not above this floor says nothing about its site: parameters that
    differ by one part in a million train apart by as much. Show it beside every counterfactual over a window.

    Args:
        ask: what a checkpoint is asked: a verb, with all else that it takes filled in.
        checkpoint: where the question starts; it is not changed.
        draws: number of perturbed copies, two or more.
        scale: relative size of the noise, as `perturbed` takes it.

    Returns:
        The answers, along a new dim `noise`: 0 to draws − 1, the seeds of the noise.

    Raises:
        ConfigError: fewer than two draws.
    """
    require(draws >= 2, f"found draws={draws}; a noise floor is the spread of two or more.")
    return results.concat([ask(perturbed(checkpoint, n, scale)) for n in range(draws)], "noise", range(draws))


def perturbed(checkpoint: Checkpoint, seed: int, scale: float = SCALE) -> Checkpoint:
    """The checkpoint with every parameter θ as θ (1 + scale · ξ), ξ standard normal; all else as it was.

    Args:
        checkpoint: it is not changed.
        seed: of the noise, a stream of its own: not that of weights drawn after `torch.manual_seed` of this number.
        scale: relative size of the noise.

    Raises:
        ConfigError: a scale that is not above 0.
    """
    require(scale > 0, f"found scale={scale}; expected a relative size above 0, such as {SCALE}.")
    draws = generator(seed, "noise on parameters")
    noisy = {
        name: value * (1 + scale * torch.as_tensor(draws.standard_normal(value.shape)).to(value))
        for name, value in checkpoint.parameters.items()
    }
    return replace(checkpoint, parameters=noisy)
