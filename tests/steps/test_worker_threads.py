import threading

import pytest
import torch
from torch import nn

from dynamics.steps.worker_threads import Spread, has_workers, spread, worker_threads

ON_CPU = {"w": torch.zeros(2)}


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """As many threads as the user may have given torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_stand_in_the_order_of_their_units(threads):
    with worker_threads(ON_CPU):
        assert spread(lambda i: i * i, range(100)) == [i * i for i in range(100)]
        assert spread(str, []) == []


def test_outside_the_caller_does_all_units():
    seen = set()
    spread(lambda _: seen.add(threading.get_ident()), range(20))
    assert seen == {threading.get_ident()}


def test_as_many_threads_work_as_torch_had(threads):
    together = threading.Barrier(threads, timeout=30)
    with worker_threads(ON_CPU):
        spread(lambda _: together.wait(), range(threads))
        assert has_workers() == (threads > 1)
    assert not has_workers()


def test_kernels_are_single_threaded_inside_and_the_setting_is_back_afterwards(threads):
    with worker_threads(ON_CPU):
        assert torch.get_num_threads() == 1
        assert set(spread(lambda _: torch.get_num_threads(), range(50))) == {1}
        with worker_threads(ON_CPU):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [threads], "threads begun later have it too"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_setting_is_back_and_no_worker_left_after_an_error(threads, error):
    before = threading.active_count()

    def caller():
        with worker_threads(ON_CPU):
            yield Spread(lambda _: torch.zeros(2), range(10))

    running = caller()
    begun = next(running)
    with pytest.raises(error):
        running.throw(error("in the caller"))
    begun.join()
    assert torch.get_num_threads() == threads
    assert threading.active_count() == before


def test_the_first_units_error_is_raised_and_later_units_are_left_out(threads):
    done = []

    def unit(i):
        if i in (3, 4):
            raise ValueError(f"unit {i}")
        done.append(i)

    with worker_threads(ON_CPU), pytest.raises(ValueError, match="unit 3"):
        spread(unit, range(10_000))
    assert len(done) < 5_000


def test_a_stop_in_the_callers_own_unit_waits_for_the_others(threads):
    caller, running = threading.get_ident(), []

    def unit(i):
        if threading.get_ident() == caller:
            raise KeyboardInterrupt
        running.append(i)
        torch.rand(10).sum()
        running.remove(i)

    with worker_threads(ON_CPU), pytest.raises(KeyboardInterrupt):
        spread(unit, range(10_000))
    assert running == []
    assert torch.get_num_threads() == threads


def test_workers_take_gradients_where_the_caller_does(threads):
    with worker_threads(ON_CPU):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                expected = torch.is_grad_enabled()
                assert set(spread(lambda _: torch.is_grad_enabled(), range(20))) == {expected}


def test_models_on_other_devices_are_left_to_their_queue():
    before = torch.get_num_threads()
    with worker_threads(dict(nn.Linear(2, 2, device="meta").named_parameters())):
        assert not has_workers()
        assert torch.get_num_threads() == before
