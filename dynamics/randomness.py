"""Named streams of randomness: each draw is a pure function of (seed, stream, indices)."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, stream: str, *indices: int) -> np.random.Generator:
    """Generator of one named stream, so that weights, split and order vary one at a time.

    Args:
        seed: the run's seed, at least 0.
        stream: what is drawn, such as "split" or "order".
        indices: further coordinates of the draw, such as the epoch, each at least 0.
    """
    return np.random.default_rng(np.random.SeedSequence((seed, zlib.crc32(stream.encode()), *indices)))
