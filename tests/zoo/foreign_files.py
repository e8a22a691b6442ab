"""Files that other programs have written."""

import torch

from checkpoints import Trajectory


def mixed(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of many types; NaN with a payload, a signed zero, one of no axes, one without elements."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "half.weight": torch.randn(3, 2, generator=generator).bfloat16(),
        "odd": torch.tensor([0x7FC00001, -(2**31)], dtype=torch.int32).view(torch.float32),
        "scale": torch.tensor(2.5 + seed, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "n_batches": torch.tensor(seed),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


def stored(run: Trajectory, step: int) -> dict[str, torch.Tensor]:
    checkpoint = run.at(step)
    return {**checkpoint.parameters, **checkpoint.buffers}


W = {"w": torch.ones(2)}
