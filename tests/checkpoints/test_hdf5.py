"""What HDF5 files may hold, and how arrays are cut into chunks."""

import math

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from checkpoints import hdf5


@given(array_shapes(min_dims=1, max_dims=4, max_side=12), st.integers(1, 30))
def test_chunks_cover_a_tensor_without_exceeding_it(shape, scale):
    shape = tuple(scale * length for length in shape)
    chunks = hdf5.chunks(shape, itemsize=8 << 10)
    assert all(1 <= chunk <= length for chunk, length in zip(chunks, shape, strict=True))
    assert math.prod(chunks) * (8 << 10) <= hdf5._CHUNK_BYTES
