"""Configs of the languages: which is which, what they are when written, how their phases follow."""

import json
import zlib
from dataclasses import replace
from importlib.resources import files

import pytest
import yaml

from dynamics.config import (
    KINDS,
    AcronymsRun,
    ConfigError,
    FactsConfig,
    FactsRun,
    IoiConfig,
    IoiRun,
    LatePhasesConfig,
    PhaseConfig,
    PhasesConfig,
    StudyConfig,
    ToyConfig,
    kind_of,
    read,
)

RUNS = {"ioi": IoiRun(), "acronyms": AcronymsRun(), "facts": FactsRun(), "aliases": StudyConfig()}


@pytest.mark.parametrize("name", RUNS)
def test_a_config_written_as_json_is_read_back_as_its_own_kind(name):
    config = replace(RUNS[name], seed=7)
    found = read(json.loads(json.dumps(config.to_dict())))
    assert found == config
    assert type(found) is KINDS[name]


def test_a_task_without_a_name_is_that_of_the_aliases():
    assert kind_of({}) is kind_of({"task": {}}) is kind_of({"task": {"modulus": 8}}) is StudyConfig
    assert "name" not in StudyConfig().to_dict()["task"]


def test_an_unknown_task_is_refused_with_those_there_are():
    with pytest.raises(
        ConfigError, match=r"task\.name is 'poems'; it must be one of 'ioi', 'acronyms', 'facts'"
    ):
        read({"task": {"name": "poems"}})


@pytest.mark.parametrize("name", ["ioi", "acronyms", "facts"])
def test_the_preset_of_a_language_is_its_defaults(name):
    text = files("dynamics").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    assert read(yaml.safe_load(text)) == RUNS[name]


@pytest.mark.parametrize("kind", [IoiRun, AcronymsRun, FactsRun])
def test_unknown_keys_are_named_beside_the_valid_ones(kind):
    with pytest.raises(ConfigError, match=r"unknown config keys \['modulus'\] in task; valid are \[.*'name'"):
        kind.from_dict({"task": {"modulus": 8}})
    with pytest.raises(ConfigError, match=r"unknown config keys \['x2'\] in phases; valid are \[.*'learn'"):
        kind.from_dict({"phases": {"x2": {"steps": 3}}})


def test_what_an_alias_study_is_called_by_has_not_changed():
    """Results and runs on disk are named by these; a new field or default is another name."""
    written = json.dumps(StudyConfig().to_dict(), sort_keys=True)
    assert zlib.crc32(written.encode()) == 2139856028


# --- phases -----------------------------------------------------------------------------------------------


def test_the_late_phase_goes_on_with_the_optimizer_and_x1_begins_a_new_one():
    late = LatePhasesConfig(learn=PhaseConfig(30), late=PhaseConfig(20))
    assert late.starts == {"learn": 0, "late": 30, "end": 50}
    assert late.optimizer_starts == (0,)
    aliases = PhasesConfig(pretrain=PhaseConfig(3), x1=PhaseConfig(4), x2=PhaseConfig(5))
    assert aliases.optimizer_starts == (0, 3)


def test_a_phase_made_shorter_leaves_the_others_as_they_are():
    late = LatePhasesConfig(learn=PhaseConfig(30, learning_rate=0.1, warmup=2), late=PhaseConfig(20))
    found = late.shortened("learn", 11)
    assert found.learn == PhaseConfig(11, learning_rate=0.1, warmup=2)
    assert found == replace(late, learn=found.learn)
    assert late.learn.steps == 30


def test_only_pretraining_can_end_early():
    aliases = PhasesConfig(stop_pretrain_at=0.25)
    assert [aliases.stop_below(name) for name in aliases.by_name] == [0.25, None, None]
    assert LatePhasesConfig().stop_below("learn") is None


def test_seeds_left_open_take_the_runs():
    run = IoiRun(seed=5)
    assert (run.split_seed, run.order_seed, run.weights_seed) == (5, 5, 5)
    run = FactsRun(task=FactsConfig(seed=0, order_seed=2), model=ToyConfig(n_ctx=5, seed=3), seed=5)
    assert (run.split_seed, run.order_seed, run.weights_seed) == (0, 2, 3)
    assert IoiRun(task=IoiConfig()).replayed == ()
