"""A run of adapters replays to the bit from checkpoints that share the frozen weights."""

import pytest
import torch

import dynamics as dy
from checkpoints import shared
from dynamics import steps
from tests.zoo.hugging_face import gpt2, hf_loss
from tests.zoo.small_models import tokens

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for it


@pytest.mark.slow
def test_every_stored_neighbour_of_a_lora_run_replays_to_the_bit(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.2)
        model = peft.get_peft_model(gpt2(torch.float32, n_embd=32), config)
        recipe = dy.Recipe(model, hf_loss, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with dy.TrajectoryWriter.create(tmp_path / "run", {}) as writer:
            for step in range(4):
                writer.append(dy.Checkpoint.capture(model, optimizer, step=step))
                optimizer.zero_grad()
                hf_loss(model, tokens(step)).backward()
                optimizer.step()
    run = dy.Trajectory.open(tmp_path / "run")
    assert shared.names(run.path)
    assert [verdict.differences for verdict in steps.verify(recipe, run, tokens)] == [()] * 3
    assert steps.verify_files(run).unchecked == ()
