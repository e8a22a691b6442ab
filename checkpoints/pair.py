"""Two checkpoints of one architecture: what one of them has can be put into the other."""

from dataclasses import dataclass

import torch

from checkpoints.checkpoint import Checkpoint, misfits


@dataclass(frozen=True, eq=False, repr=False)
class CheckpointPair:
    """A base checkpoint and the source checkpoint that something is taken from: of one run, or of two.

    A later source into an earlier base asks what suffices, an earlier one into a later base what is necessary.

    Attributes:
        base: the checkpoint that receives.
        source: the checkpoint that gives.

    Raises:
        ValueError: their parameters or buffers differ in names, shapes or dtypes; says in which.
    """

    base: Checkpoint
    source: Checkpoint

    def __post_init__(self) -> None:
        for kind in ("parameters", "buffers"):
            ours, theirs = getattr(self.base, kind), getattr(self.source, kind)
            if problems := misfits("the base", ours, "the source", theirs):
                raise ValueError(
                    f"The {kind} of a pair's two checkpoints differ: {'; '.join(problems)}. Pair checkpoints of "
                    "one architecture and dtype."
                )

    def __repr__(self) -> str:
        return f"CheckpointPair(base={self.base!r}, source={self.source!r})"

    def reversed(self) -> "CheckpointPair":
        """Base and source exchanged: necessity where the pair asked for sufficiency."""
        return CheckpointPair(self.source, self.base)

    def to(self, device: torch.device | str) -> "CheckpointPair":
        """The same pair with all tensors on another device."""
        return CheckpointPair(self.base.to(device), self.source.to(device))
