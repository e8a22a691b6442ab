"""TransformerLens's own activation patching, for models that have its hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformer_lens import patching as _patching

from dynamics.trees import Index

patching: Any = _patching


def run_patched(
    model: nn.Module,
    tokens: Tensor,
    hook: str,
    cuts: Sequence[Index],
    values: Tensor,
    measured: Callable[[Tensor], None],
) -> None:
    """Run `transformer_lens.patching.generic_activation_patch` over slices of one activation.

    Args:
        model: a HookedRootModule or TransformerBridge in eval mode.
        tokens: [batch, pos], run once for each slice.
        hook: full name of the hook point.
        cuts: the slice exchanged in each run.
        values: what the activation is exchanged for, of its shape.
        measured: called with the logits [batch, pos, vocab] of each run, in order. It keeps what it wants of
            them, since TransformerLens stores what a metric gives in single precision.
    """

    def setter(activation: Tensor, index: Sequence[int], new: Tensor) -> Tensor:
        cut, patched = cuts[index[1]], activation.clone()
        patched[cut] = new[cut]
        return patched

    def metric(logits: Tensor) -> Tensor:
        measured(logits)
        return logits.new_zeros(())

    # a layer of None makes the activation's name the hook's full name
    rows = pd.DataFrame({"layer": [None] * len(cuts), "cut": range(len(cuts))}, dtype=object)
    with _without_its_bar():
        patching.generic_activation_patch(
            model,
            tokens,
            {hook: values},
            metric,
            setter,
            hook,
            index_df=rows,
        )


@contextmanager
def _without_its_bar() -> Iterator[None]:
    """TransformerLens shows a progress bar for every call, however short; the verb has one of its own."""
    shown = patching.tqdm
    patching.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        patching.tqdm = shown
