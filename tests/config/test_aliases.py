"""Configs: impossible ones are refused where they are made, possible ones survive the way through JSON."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from dynamics.config import (
    AliasConfig,
    ConfigError,
    PatchingConfig,
    PhaseConfig,
    PhasesConfig,
    PrimaryConfig,
    ScheduleConfig,
    StudyConfig,
    ToyConfig,
    TrainerConfig,
    answer,
)

THREE_PHASES = PhasesConfig(
    pretrain=PhaseConfig(steps=10, learning_rate=0.4, warmup=3),
    x1=PhaseConfig(steps=5, learning_rate=0.2, warmup=1),
    x2=PhaseConfig(steps=8, learning_rate=0.1),
)

IMPOSSIBLE = [
    (AliasConfig, {"modulus": 4}, r"modulus is 4; below 8"),
    (AliasConfig, {"modulus": 0}, r"modulus is 0; below 8"),
    (AliasConfig, {"modulus": 62}, r"modulus 62 does not divide into four equal sets; take a multiple of 4"),
    (AliasConfig, {"multipliers": ()}, r"multipliers is empty"),
    (AliasConfig, {"multipliers": (2, 3, 2)}, r"multipliers \(2, 3, 2\) repeats a value"),
    (AliasConfig, {"multipliers": (2, 60)}, r"multipliers \[60\] lie outside 0\.\.59"),
    (AliasConfig, {"multipliers": (-1, 2)}, r"multipliers \[-1\] lie outside 0\.\.59"),
    (AliasConfig, {"multipliers": (0,), "train_multipliers": 1}, r"multipliers \(0,\) identify nothing"),
    (AliasConfig, {"train_multipliers": 0}, r"train_multipliers is 0; with 6 multipliers it must be 1\.\.6"),
    (AliasConfig, {"train_multipliers": 7}, r"train_multipliers is 7; with 6 multipliers it must be 1\.\.6"),
    (AliasConfig, {"multipliers": (2, 3)}, r"train_multipliers is 5; with 2 multipliers it must be 1\.\.2"),
    (AliasConfig, {"operation": "div"}, r"task\.operation is 'div'; it must be one of 'prod', 'sum', 'ssq'"),
    (AliasConfig, {"x2_roles": "swapped"}, r"task\.x2_roles is 'swapped'; .*'drawn', 'exchanged'"),
    (AliasConfig, {"table_fraction": 1.0}, r"table_fraction is 1\.0; it is a share"),
    (AliasConfig, {"table_fraction": float("nan")}, r"table_fraction is nan"),
    (AliasConfig, {"heldout_fraction": -0.1}, r"heldout_fraction is -0\.1"),
    (AliasConfig, {"definition_copies": 0}, r"definition_copies must be at least 1"),
    (ToyConfig, {"activation": "tanh"}, r"model\.activation is 'tanh'; .*'relu', 'gelu', 'silu', 'solu'"),
    (ToyConfig, {"normalization": "BN"}, r"model\.normalization is 'BN'; .*'LN', 'RMS', 'none'"),
    (ToyConfig, {"dtype": "float16"}, r"model\.dtype is 'float16'"),
    *((ToyConfig, {n: 0}, rf"model\.{n} is 0; it must be at least 1")
      for n in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx")),
    (PhaseConfig, {"steps": 0}, r"a phase has 0 steps"),
    (PhaseConfig, {"steps": 1, "learning_rate": 0.0}, r"learning_rate is 0\.0"),
    (PhaseConfig, {"steps": 1, "learning_rate": float("nan")}, r"learning_rate is nan"),
    (PhaseConfig, {"steps": 1, "warmup": -1}, r"warmup is -1 steps"),
    (PhasesConfig, {"batch_size": 0}, r"phases\.batch_size is 0"),
    (PhasesConfig, {"max_grad_norm": 0.0}, r"phases\.max_grad_norm is 0\.0"),
    (ScheduleConfig, {"per_decade": 0}, r"schedule\.per_decade"),
    (ScheduleConfig, {"dense": -1}, r"schedule\.dense"),
    (ScheduleConfig, {"evaluate_every": 0}, r"schedule\.evaluate_every"),
    (PrimaryConfig, {"optimizer": "new"}, r"patching\.primary\.optimizer is 'new'; .*'stored', 'fresh'"),
    (PrimaryConfig, {"measure": "loss"}, r"patching\.primary\.measure is 'loss'"),
    (PrimaryConfig, {"level": "head"}, r"patching\.primary\.level is 'head'; .*'layers'"),
    (PatchingConfig, {"optimizers": ("sgd",)}, r"patching\.optimizers is 'sgd'"),
    (PatchingConfig, {"levels": ("tokens",)}, r"patching\.levels is 'tokens'"),
    (PatchingConfig, {"measures": ("loss",)}, r"patching\.measures is 'loss'"),
    (PatchingConfig, {"x2_steps": (0, 50)}, r"primary\.x2_step is 10, which is not among \(0, 50\)"),
    (PatchingConfig, {"optimizers": ("stored",)}, r"primary\.optimizer is 'fresh', which is not among"),
    (PatchingConfig, {"measures": ("probability",)}, r"primary\.measure is 'correct_logit', which is not among"),
    (PatchingConfig, {"levels": ("heads",)}, r"primary\.level is 'components', which is not among"),
    (TrainerConfig, {"logger": "mlflow"}, r"trainer\.logger is 'mlflow'; .*'csv', 'tensorboard', 'wandb'"),
    (TrainerConfig, {"threads": 0}, r"trainer\.threads"),
    (StudyConfig, {"model": ToyConfig(n_ctx=3)}, r"model\.n_ctx is 3; definitions and questions have 4 tokens"),
    (StudyConfig, {"phases": THREE_PHASES}, r"x2_steps \[10, 50, 400\] lie outside X2's 8 steps"),
    (StudyConfig, {"patching": PatchingConfig(x2_steps=(-1, 10))}, r"x2_steps \[-1\] lie outside"),
    (TrainerConfig, {"precision": "8"}, r"trainer\.precision is '8'; .*'32-true'"),
    (PhasesConfig, {"betas": (1.5, 0.9)}, r"phases\.betas is \(1\.5, 0\.9\)"),
    (PhasesConfig, {"weight_decay": -1.0}, r"phases\.weight_decay is -1\.0"),
    (StudyConfig, {"seed": -1}, r"seed is -1; a seed is at least 0"),
    (AliasConfig, {"order_seed": -2}, r"task\.order_seed is -2"),
    (AliasConfig, {"modulus": 8, "multipliers": (2,), "train_multipliers": 1, "heldout_fraction": 0.99},
     r"heldout_fraction 0\.99 leaves none of 36 pairs"),
    (PatchingConfig, {"x2_steps": (0, 10, 10)}, r"x2_steps \(0, 10, 10\) repeats a value"),
    (PatchingConfig, {"levels": ()}, r"patching\.levels is empty"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        pytest.param(*case, id=f"{case[0].__name__}-{next(iter(case[1]))}-{i}")
        for i, case in enumerate(IMPOSSIBLE)
    ],
)
def test_an_impossible_config_is_refused_with_what_was_found(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"modulus": 8, "multipliers": (1,), "train_multipliers": 1},
        {"multipliers": (0, 59), "train_multipliers": 2},
        {"table_fraction": 0.0, "heldout_fraction": 0.0},
        {"multipliers": (0,), "train_multipliers": 1, "operation": "sum"},
    ],
)
def test_configs_at_the_edge_of_the_possible_are_accepted(values):
    assert AliasConfig(**values).modulus in (8, 60)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tsak": {}}, r"unknown config keys \['tsak'\] in the config; valid are \[.*'task', 'trainer'\]"),
        (
            {"task": {"mod": 60}},
            r"unknown config keys \['mod'\] in task; valid are \[.*'modulus', 'multipliers'",
        ),
        ({"phases": {"x3": {}}}, r"unknown config keys \['x3'\] in phases; valid are \[.*'pretrain'.*'x2'\]"),
        ({"trainer": {"gpus": 1, "tpus": 1}}, r"unknown config keys \['gpus', 'tpus'\] in trainer"),
    ],
)
def test_unknown_keys_are_named_beside_the_valid_ones(data, message):
    with pytest.raises(ConfigError, match=message):
        StudyConfig.from_dict(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"phases": {"pretrain": {"stepz": 3}}}, r"stepz.*learning_rate"),
        ({"patching": {"primary": {"step": 3}}}, r"step.*x2_step"),
    ],
)
def test_unknown_keys_two_levels_down_are_named_beside_the_valid_ones(data, message):
    with pytest.raises(ConfigError, match=message):
        StudyConfig.from_dict(data)


CHANGED = StudyConfig(
    task=AliasConfig(
        modulus=12, multipliers=[2, 3], train_multipliers=1, operation="ssq", seed=0, x2_roles="exchanged"
    ),
    model=ToyConfig(n_layers=1, attn_only=True, dtype="float64", normalization="none"),
    phases=replace(THREE_PHASES, stop_pretrain_at=0.25, betas=[0.8, 0.95]),
    schedule=ScheduleConfig(dense=0),
    patching=PatchingConfig(
        x2_steps=[3], levels=["heads"], measures=["probability"], optimizers=["stored"],
        primary=PrimaryConfig(x2_step=3, level="heads", measure="probability", optimizer="stored"),
    ),
    trainer=TrainerConfig(logger="wandb", threads=2),
    seed=7,
)  # fmt: skip


@pytest.mark.parametrize("config", [StudyConfig(), CHANGED], ids=["default", "changed"])
def test_a_config_written_as_json_and_read_back_is_equal(config):
    read = StudyConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read == config
    assert hash(read) == hash(config)
    assert read.to_dict() == config.to_dict()


def test_every_changed_value_is_written():
    plain = CHANGED.to_dict()
    assert plain["task"]["multipliers"] == [2, 3]
    assert plain["phases"]["pretrain"] == {"steps": 10, "learning_rate": 0.4, "warmup": 3}
    assert plain["patching"]["primary"] == {
        "x2_step": 3, "optimizer": "stored", "measure": "probability", "level": "heads"
    }  # fmt: skip
    assert (plain["seed"], plain["task"]["seed"], plain["task"]["order_seed"]) == (7, 0, None)


def test_a_part_left_out_takes_its_defaults():
    assert StudyConfig.from_dict({}) == StudyConfig()
    assert StudyConfig.from_dict({"model": {"n_layers": 3}}) == StudyConfig(model=ToyConfig(n_layers=3))
    short = {"pretrain": {"steps": 3}}
    assert StudyConfig.from_dict({"phases": short}).phases.pretrain == PhaseConfig(steps=3)


def test_configs_cannot_be_changed_once_made():
    with pytest.raises(FrozenInstanceError):
        StudyConfig().seed = 3  # type: ignore[misc]


def test_seeds_left_open_take_the_studys():
    config = StudyConfig(seed=9)
    assert (config.split_seed, config.order_seed, config.weights_seed) == (9, 9, 9)


def test_a_new_study_seed_moves_every_seed_left_open():
    saved = StudyConfig.from_dict(StudyConfig(task=AliasConfig(order_seed=4), seed=9).to_dict())
    config = replace(saved, seed=1)
    assert (config.split_seed, config.order_seed, config.weights_seed) == (1, 4, 1)


def test_a_seed_of_0_is_kept_beside_another_study_seed():
    config = StudyConfig(task=AliasConfig(seed=0, order_seed=0), model=ToyConfig(seed=0), seed=9)
    assert (config.split_seed, config.order_seed, config.weights_seed) == (0, 0, 0)


def test_each_seed_can_be_set_alone():
    config = StudyConfig(task=AliasConfig(order_seed=4), seed=9)
    assert (config.split_seed, config.order_seed, config.weights_seed) == (9, 4, 9)


def test_phases_start_where_the_one_before_them_ends():
    assert THREE_PHASES.starts == {"pretrain": 0, "x1": 10, "x2": 15, "end": 23}
    where = {
        0: ("pretrain", 0),
        9: ("pretrain", 9),
        10: ("x1", 0),
        14: ("x1", 4),
        15: ("x2", 0),
        22: ("x2", 7),
    }
    assert {step: THREE_PHASES.locate(step) for step in where} == where


@pytest.mark.parametrize("step", [-1, 23])
def test_a_step_outside_the_run_lies_in_no_phase(step):
    with pytest.raises(ConfigError, match=rf"step {step} lies outside the run's steps 0\.\.22"):
        THREE_PHASES.locate(step)


def test_the_learning_rate_warms_up_linearly_in_every_phase_and_stays():
    by_hand = [
        0.1,
        0.2,
        0.3,
        0.4,
        0.4,
        0.4,
        0.4,
        0.4,
        0.4,
        0.4,
        0.1,
        0.2,
        0.2,
        0.2,
        0.2,
        *[0.1] * 8,
        0.1,
        0.1,
    ]
    assert [THREE_PHASES.learning_rate(step) for step in range(25)] == pytest.approx(by_hand, rel=1e-15)


@pytest.mark.parametrize(
    ("operation", "x", "y", "result"),
    [("prod", 7, 9, 3), ("sum", 7, 9, 4), ("ssq", 7, 9, 10), ("prod", 0, 5, 0)],
)
def test_answers_by_hand_modulo_12(operation, x, y, result):
    assert answer(operation, x, y, 12) == result


def test_configs_are_made_and_checked_without_importing_torch():
    script = (
        "import sys; from dynamics.config import StudyConfig; StudyConfig.from_dict(StudyConfig().to_dict());"
        "print(sorted({'torch', 'numpy', 'transformer_lens', 'lightning', 'xarray'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed == "[]\n"
