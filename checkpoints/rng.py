"""The state of the random number generators that a training step may draw from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class RngState:
    """The global generators of torch, Python and NumPy at one moment.

    Attributes:
        torch: torch's CPU generator, uint8 [n_bytes].
        cuda: one state per CUDA device, uint8 [n_bytes]; empty where CUDA was not in use.
        python: `random`: version, words int64 [625], gauss.
        numpy: NumPy's legacy global generator as `numpy.random.get_state(legacy=False)` gives it, its array
            as a tensor.
    """

    torch: Tensor
    cuda: tuple[Tensor, ...]
    python: dict[str, Any]
    numpy: dict[str, Any]

    def __repr__(self) -> str:
        cuda = f", {len(self.cuda)} CUDA devices" if self.cuda else ""
        return f"RngState(torch{cuda}, Python and NumPy)"

    @classmethod
    def capture(cls) -> "RngState":
        """The generators as they stand; nothing is drawn, and CUDA is not started for it."""
        version, words, gauss = random.getstate()
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  (the global generator is what is kept)
        return cls(
            torch=torch.get_rng_state().clone(),
            cuda=tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),  # type: ignore[no-untyped-call]
            python={"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
            numpy=_with_arrays(numpy_state, np.ndarray, lambda array: torch.from_numpy(array.copy())),
        )

    def apply(self) -> None:
        """Set the global generators to this state; CUDA states beyond the devices at hand are left out."""
        torch.set_rng_state(self.torch)
        if self.cuda and torch.cuda.is_available():
            for device, state in zip(range(torch.cuda.device_count()), self.cuda, strict=False):
                torch.cuda.set_rng_state(state, device)
        random.setstate((self.python["version"], tuple(self.python["words"].tolist()), self.python["gauss"]))
        numpy_state = _with_arrays(self.numpy, Tensor, lambda tensor: tensor.numpy())
        np.random.set_state(numpy_state)  # noqa: NPY002  (the global generator is what is set)


@contextmanager
def replayed(state: RngState | None) -> Iterator[None]:
    """Draw from `state` inside, and give the caller's generators back on the way out, whatever happens.

    Where `state` is None the generators are only given back.
    """
    if state is not None and state.cuda and torch.cuda.is_available():
        torch.cuda.init()  # type: ignore[no-untyped-call]
    before = RngState.capture()
    try:
        if state is not None:
            state.apply()
        yield
    finally:
        before.apply()


def as_value(state: RngState | None) -> dict[str, Any] | None:
    """The state as a plain value of tensors and scalars."""
    if state is None:
        return None
    return {"torch": state.torch, "cuda": state.cuda, "python": state.python, "numpy": state.numpy}


def _with_arrays(value: Any, kind: type, convert: Any) -> Any:
    """A nested dict with every leaf of one kind converted."""
    if isinstance(value, dict):
        return {key: _with_arrays(item, kind, convert) for key, item in value.items()}
    return convert(value) if isinstance(value, kind) else value
