"""Fast paths that fall back say so once, and running out of memory halves what is taken at a time."""

import logging

import pytest
import torch

from dynamics.steps.fallbacks import ComputePaths, Fallback, in_halves, out_of_memory, reason

CPU_SAYS = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes"


def test_every_path_of_a_part_is_kept_in_order_and_once():
    paths = ComputePaths("a verb")
    paths.took("steps", "all at once")
    paths.took("measures", "vmap")
    paths.took("steps", "all at once")
    paths.took("steps", "one by one")
    assert paths.facts() == {"measures": "vmap", "steps": "all at once; one by one"}


def test_a_fallback_is_logged_once_a_call_with_its_reason(caplog):
    paths = ComputePaths("patch_gradients")
    with caplog.at_level(logging.WARNING):
        for why in ("an LSTM", "another reason"):
            paths.fell_back("measures", "one model at a time", why)
        ComputePaths("patch_gradients").fell_back("measures", "one model at a time", "an LSTM")
    assert [r.getMessage() for r in caplog.records] == 2 * [
        "patch_gradients: measures: one model at a time, since an LSTM"
    ]
    assert paths.facts() == {"measures": "one model at a time, since an LSTM"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError(CPU_SAYS), True),
        (RuntimeError("vmap: it looks like you called .item()"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error, expected):
    assert out_of_memory(error) is expected


def test_a_reason_is_one_line_of_limited_length_without_the_mark_between_paths():
    line = reason(RuntimeError("first; second\n  third " + "x" * 500))
    assert line.startswith("RuntimeError: first, second third xxx")
    assert line.endswith("...")
    assert len(line) < 200
    assert reason(Fallback("gradients are sparse")) == "gradients are sparse"


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_what_memory_does_not_hold_is_taken_in_halves_in_order(most):
    taken, paths = [], ComputePaths()

    def run(items):
        if len(items) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        taken.append(len(items))
        return [10 * item for item in items]

    assert in_halves(run, range(5), paths, "gradients") == [0, 10, 20, 30, 40]
    assert max(taken) <= most
    assert ("fewer at a time" in paths.facts().get("gradients", "")) == (most < 5)


def test_one_item_that_memory_does_not_hold_and_other_errors_are_raised_as_they_are():
    def full(items):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def wrong(items):
        raise ZeroDivisionError

    with pytest.raises(torch.OutOfMemoryError):
        in_halves(full, range(5), ComputePaths(), "gradients")
    with pytest.raises(ZeroDivisionError):
        in_halves(wrong, range(5), ComputePaths(), "gradients")
