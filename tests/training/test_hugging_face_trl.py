"""TRL's trainers inherit from Hugging Face's: SFTTrainer's steps, recorded and replayed bit for bit."""

import pytest
import tokenizers
import torch
import transformers

import dynamics as dy
from checkpoints import Trajectory, TrajectoryWriter
from tests.zoo.hugging_face import llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing:FutureWarning"),
]  # TRL asks


def eleven_words():
    """A tokenizer, which an SFTTrainer pads with."""
    ids = {word: i for i, word in enumerate(["<pad>", *"abcdefghij"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="j")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_every_stored_neighbour_of_an_sft_run_replays_to_the_bit(tmp_path, accumulated):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(11, (length,), generator=generator).tolist() for length in (4, 6, 5, 7) * 6]
    settings = trl.SFTConfig(
        str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulated,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    with TrajectoryWriter.create(tmp_path / "run", {}) as writer:
        trainer = trl.SFTTrainer(
            llama(torch.float32),
            settings,
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
            processing_class=eleven_words(),
            callbacks=[dy.training.HuggingFaceRecorder(writer, range(7))],
        )
        trainer.train()
    run = Trajectory.open(tmp_path / "run")
    assert run.steps == tuple(range(7))
    recipe, batches = dy.Recipe.from_trainer(trainer), dy.training.batches_of(trainer)
    assert [verdict.differences for verdict in dy.steps.verify(recipe, run, batches)] == [()] * 6
