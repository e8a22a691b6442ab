"""The storage of adapters, measured on a small GPT-2."""

import pytest

from scripts.benchmarks import adapter_storage
from tests.scripts.calling import call, in_small, rows_of

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for it

SMALL = {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 20_000}


@pytest.mark.slow
def test_the_ratio_is_that_of_the_bytes_and_kept():
    with in_small(adapter_storage, SHAPE=SMALL, N_CHECKPOINTS=4):
        said = dict(rows_of(call(adapter_storage))[2:])
    model, adapters, stored = (float(list(said.values())[i].split(" MB")[0]) for i in range(3))
    assert 12 < model < 13
    assert adapters == pytest.approx(4 * 3 * 2 * 4 * (128 + 384) * 4 / 1e6, abs=0.05)
    assert model + adapters / 2 < stored < 1.3 * (model + adapters)
    assert list(said.values())[-1] == "yes"


@pytest.mark.slow
def test_a_promise_that_is_not_kept_fails():
    with in_small(adapter_storage, SHAPE=SMALL, N_CHECKPOINTS=2, PROMISED=0.9), pytest.raises(SystemExit):
        call(adapter_storage)
