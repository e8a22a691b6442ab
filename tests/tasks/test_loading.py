"""Which task a run is of is read off its config; a config that names none is refused."""

import pytest

from dynamics import tasks
from dynamics.config import ConfigError, FactsRun, StudyConfig, task_name

NAMELESS = [
    {},
    {"seed": 3},
    {"task": {}},
    {"task": "aliases"},
    {"task": {"seed": 1}},
    {"lr": 0.1, "task": {"dataset": "mnist"}},
]


@pytest.mark.parametrize("load", [tasks.load, tasks.aliases.load])
@pytest.mark.parametrize("config", NAMELESS)
def test_a_config_that_names_no_task_is_refused(load, config):
    with pytest.raises(ConfigError, match=r"names no task: found the keys .*dy\.steps\.verify\(recipe"):
        load(config)


@pytest.mark.parametrize("config", [*NAMELESS, {"task": {"name": "poems"}}])
def test_such_a_config_has_no_task_name(config):
    assert task_name(config) is None


@pytest.mark.parametrize(("config", "name"), [(StudyConfig(), "aliases"), (FactsRun(), "facts")])
def test_what_the_toolkit_writes_names_its_task(config, name):
    assert task_name(config.to_dict()) == name
    assert tasks.load(config.to_dict()).config == config


def test_one_key_of_the_alias_task_is_enough():
    assert tasks.load({"task": {"operation": "sum"}, "seed": 2}).config.task.operation == "sum"


def test_a_name_that_there_is_not_is_refused_with_what_was_meant():
    with pytest.raises(
        ConfigError, match=r"task\.name is 'fact'; it must be one of .* Did you mean 'facts'\?"
    ):
        tasks.load({"task": {"name": "fact"}})


def test_a_run_of_a_language_is_none_of_aliases():
    with pytest.raises(ConfigError, match="the run is of the task 'facts'; this needs one of aliases"):
        tasks.aliases.load(FactsRun().to_dict())
