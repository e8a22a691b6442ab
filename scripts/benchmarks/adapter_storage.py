"""What fifty checkpoints of LoRA take on the disk, beside one model and the adapters. About two minutes, one core.

A GPT-2 of random weights, 124 million parameters, with adapters of rank 4 on the projections of attention; AdamW
steps on random gradients. Promised: at most 1.3 times one model plus the adapters and their moments.

    .venv/bin/python scripts/benchmarks/adapter_storage.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import dynamics as dy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import markdown, stamp

SHAPE = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
N_CHECKPOINTS = 50
PROMISED = 1.3


def adapted() -> torch.nn.Module:
    """GPT-2 with adapters; all but them is frozen."""
    import peft

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE))
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def n_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def record(folder: Path, model: torch.nn.Module) -> list[float]:
    """Record AdamW's steps on random gradients; the CPU seconds of each checkpoint."""
    optimizer, seconds = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    with dy.TrajectoryWriter.create(folder, SHAPE) as writer:
        for step in tqdm(range(N_CHECKPOINTS), desc="checkpoints"):
            began = time.process_time()
            writer.append(dy.Checkpoint.capture(model, optimizer, step=step))
            seconds.append(time.process_time() - began)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            optimizer.step()
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    torch.manual_seed(0)
    model = adapted()
    whole = n_bytes([*model.parameters(), *model.buffers()])
    adapters = N_CHECKPOINTS * 3 * n_bytes(p for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = record(folder, model)
        stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        run = dy.Trajectory.open(folder)
        well = not run.verify() and run.last.equals(run.at(run.steps[-1]))
    ratio = stored / (whole + adapters)
    cells = [
        ("one model", f"{whole / 1e6:,.1f} MB"),
        (f"{N_CHECKPOINTS} adapters with their moments", f"{adapters / 1e6:,.1f} MB"),
        (f"{N_CHECKPOINTS} checkpoints on the disk", f"{stored / 1e6:,.1f} MB, {ratio:.2f} times both"),
        (
            "CPU seconds of the first, of each other",
            f"{seconds[0]:.1f}, {sum(seconds[1:]) / len(seconds[1:]):.2f}",
        ),
        ("all read back and well", "yes" if well else "NO"),
    ]
    print("\n".join([*markdown(["", ""], cells), "", stamp(__file__)]))
    if ratio > PROMISED or not well:
        raise SystemExit(f"{ratio:.2f} times one model plus the adapters, promised were {PROMISED}")


if __name__ == "__main__":
    main()
