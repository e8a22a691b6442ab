"""A sweep whose kept results were damaged gives what it gave before."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import xarray as xr

from tests.zoo.sweep_runs import counted, lines, swept


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
def test_a_damaged_shard_is_named_and_computed_again(run, tmp_path, caplog):
    calls, out = tmp_path / "calls", tmp_path / "kept"
    verb = partial(counted, calls=calls)
    first = swept(verb, run, [8], out=out)
    computed = lines(calls)
    victim, truncated, *_ = sorted((out / "shards").iterdir())
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    truncated.write_bytes(truncated.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        again = swept(verb, run, [8], out=out)
    xr.testing.assert_identical(again, first)
    assert lines(calls) == computed + 2
    assert victim.name in caplog.text
    assert truncated.name in caplog.text
    xr.testing.assert_identical(swept(verb, run, [8], out=out), first)
    assert lines(calls) == computed + 2
