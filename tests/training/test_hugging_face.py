"""A Hugging Face Trainer's steps, recorded and replayed bit for bit."""

import copy

import pytest
import torch
import transformers

import dynamics as dy
from checkpoints import Trajectory, TrajectoryError, TrajectoryWriter
from dynamics.cli import main as cli
from dynamics.recipe import ByNorm, RecipeError
from tests.zoo.hugging_face import llama, neox

ROWS = [
    {"input_ids": (row := torch.randint(11, (6,), generator=torch.Generator().manual_seed(i))), "labels": row}
    for i in range(37)
]


def padded(rows):
    """Labels of different length, so that the number of items is another in every batch."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    batch["labels"] = batch["labels"].clone()
    for i, length in enumerate(batch["input_ids"][:, 0] % 4):
        batch["labels"][i, 6 - int(length) :] = -100
    return batch


def trainer(model, folder, callbacks=(), kind=transformers.Trainer, steps=40, **changes):
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return kind(
        model=model,
        args=transformers.TrainingArguments(str(folder), **settings),
        train_dataset=ROWS,
        data_collator=padded,
        callbacks=list(callbacks),
    )


def trained(model, folder, kind=transformers.Trainer, steps=40, **changes):
    """A Trainer that has trained, and its trajectory with every step."""
    with TrajectoryWriter.create(folder / "run", {}) as writer:
        recorder = dy.training.HuggingFaceRecorder(writer, range(steps + 1))
        done = trainer(model, folder / "out", [recorder], kind, steps, **changes)
        done.train()
    return done, Trajectory.open(folder / "run")


def single(build):
    """Of one layer."""
    dropouts = {
        "neox": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
        "llama": {"attention_dropout": 0.1},
    }
    build_model = {"neox": neox, "llama": llama}[build]
    return build_model(torch.float32, num_hidden_layers=1, **dropouts[build])


def differing(recipe, run, batch_of):
    verdicts = list(dy.steps.verify(recipe, run, batch_of))
    return [
        (verdict.start, verdict.differences[:3], verdict.cause) for verdict in verdicts if verdict.differences
    ]


BFLOAT = {"bf16": True}


@pytest.mark.parametrize(
    ("build", "accumulation", "changes", "steps"),
    [
        pytest.param("llama", 4, {}, 4, id="quick"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("neox", 1, {}, 40),
                ("neox", 1, BFLOAT, 12),
                ("neox", 4, {}, 12),
                ("neox", 4, BFLOAT, 12),
                ("llama", 1, {}, 12),
                ("llama", 1, BFLOAT, 12),
                ("llama", 4, {}, 12),
                ("llama", 4, BFLOAT, 40),
            ]
        ),
    ],
)
def test_every_step_of_a_trainer_replays_bit_for_bit(build, accumulation, changes, steps, tmp_path):
    """Twelve steps go past the warm-up, through the cosine and past an epoch's end: it has ten batches."""
    model = single(build)
    settings = {"gradient_accumulation_steps": accumulation, **changes}
    before = trainer(copy.deepcopy(model), tmp_path, steps=steps, **settings)
    foreseen, batches = dy.Recipe.from_trainer(before), dy.training.batches_of(before)
    done, run = trained(model, tmp_path, steps=steps, **settings)
    assert run.steps == tuple(range(steps + 1))
    assert len(run.at(3).optimizer.groups) == 2
    assert run.at(3).optimizer.groups[0]["fused"]
    assert differing(foreseen, run, batches) == []
    after, batches = dy.Recipe.from_trainer(done), dy.training.batches_of(done)
    assert after.clip == ByNorm(1.0, over="model")
    assert after.accumulate == accumulation
    for step in (0, 3):
        assert dy.steps.replay(after, run.at(step), batches(step)).differences(run.at(step + 1)) == []


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Four steps over three-row batches, two accumulated: the epoch's end has one batch left."""
    folder = tmp_path_factory.mktemp("short")
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 13, "max_grad_norm": 0.1}
    return trained(single("neox"), folder, Summing, 4, **settings)


class Summing(transformers.Trainer):
    """With a loss of its own, a mean over each micro-batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(inputs["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), inputs["input_ids"][:, 1:])
        return (loss, logits) if return_outputs else loss


def test_a_loss_of_the_trainers_own_and_an_epochs_last_short_step_replay(short):
    done, run = short
    batches = dy.training.batches_of(done)
    assert [len(batches(step)) for step in range(4)] == [2, 1, 2, 1]
    assert differing(dy.Recipe.from_trainer(done), run, batches) == []


def test_the_trainer_and_its_model_stay_as_they_were(short):
    done, run = short
    before = {name: p.detach().clone() for name, p in done.model.named_parameters()}
    training, rate = done.model.training, done.optimizer.param_groups[0]["lr"]
    drawn = torch.get_rng_state()
    recipe, batches = dy.Recipe.from_trainer(done), dy.training.batches_of(done)
    dy.steps.replay(recipe, run.at(0), batches(0))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert done.model.training == training
    assert done.optimizer.param_groups[0]["lr"] == rate
    assert all(torch.equal(before[name], p) for name, p in done.model.named_parameters())
    assert not {id(p) for p in recipe.model.parameters()} & {id(p) for p in done.model.parameters()}


def test_the_verbs_take_a_trainers_step(short):
    done, run = short
    recipe, batches = dy.Recipe.from_trainer(done), dy.training.batches_of(done)
    found = dy.steps.gradient(recipe, run.at(2), batches(2))
    (after,) = dy.steps.steps_from(recipe, run.at(2), [found.gradients])
    for name, tensor in run.at(3).parameters.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_scheduler_that_was_given_to_the_trainer_is_asked_for(tmp_path):
    given = trainer(single("neox"), tmp_path)
    given.create_optimizer()
    given.lr_scheduler = torch.optim.lr_scheduler.StepLR(given.optimizer, 3)
    given._created_lr_scheduler = False
    recipe = dy.Recipe.from_trainer(given)
    with pytest.raises(RecipeError, match=r"was given a scheduler.*dataclasses.replace\(recipe, scheduler="):
        recipe.build_scheduler(recipe.build_optimizer(recipe.model.parameters()))


def test_what_is_no_trainer_or_has_rows_in_no_known_order_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="Linear is no Hugging Face Trainer"):
        dy.Recipe.from_trainer(torch.nn.Linear(1, 1))
    streaming = trainer(single("neox"), tmp_path, accelerator_config={"use_seedable_sampler": False})
    with pytest.raises(RecipeError, match="rows under RandomSampler cannot be told"):
        dy.training.batches_of(streaming)


@pytest.mark.slow
def test_a_trainers_own_folders_become_the_trajectory_that_was_recorded(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2}
    done, recorded = trained(single("neox"), tmp_path, steps=6, **changes)
    recipe = dy.Recipe.from_trainer(done)
    settings = {
        "model": recipe.model,
        "optimizer": recipe.build_optimizer(recipe.model.parameters()),
        "load": transformers.GPTNeoXForCausalLM.from_pretrained,
    }
    drawn = torch.get_rng_state()
    run = Trajectory.from_trainer(tmp_path / "out", tmp_path / "imported", **settings)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert run.steps == (2, 4, 6)
    for step in run.steps:
        assert run.at(step).differences(recorded.at(step)) == []
        assert run.at(step).rng_differences(recorded.at(step)) == []
    assert differing(recipe, run, dy.training.batches_of(done)) == []
    with pytest.raises(TrajectoryError, match="has no folders like checkpoint-500"):
        Trajectory.from_trainer(tmp_path, tmp_path / "nothing", **settings)


@pytest.mark.slow
def test_the_command_imports_a_trainers_folder_without_being_told_its_groups(tmp_path, capsys):
    changes = {"save_strategy": "steps", "save_steps": 2}
    done, recorded = trained(single("neox"), tmp_path, steps=4, **changes)
    cli(["import", "trainer", str(tmp_path / "out"), "--out", str(tmp_path / "imported")])
    run = Trajectory.open(tmp_path / "imported")
    assert run.steps == (2, 4)
    assert all(run.at(step).differences(recorded.at(step)) == [] for step in run.steps)
    assert differing(dy.Recipe.from_trainer(done), run, dy.training.batches_of(done)) == []
    for wrong, says in (
        (["trainer", str(tmp_path)], "has no folders like checkpoint-500"),
        (["trainer", str(tmp_path / "out"), str(tmp_path)], "found 2 folders; a Trainer has one"),
    ):
        with pytest.raises(SystemExit):
            cli(["import", *wrong, "--out", str(tmp_path / "nothing")])
        assert says in capsys.readouterr().err
