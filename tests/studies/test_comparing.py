"""What is written about a run's checkpoints: the Datasets of the functions, tables, figures."""

import shutil

import numpy as np
import pytest
import torch

import dynamics as dy
from checkpoints import Trajectory, TrajectoryError
from dynamics import comparison, sites, studies, tasks
from dynamics.results import ResultsError
from tests.zoo.comparison_models import short_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trajectory:
    return short_run(tmp_path_factory.mktemp("comparing") / "run", seed=1)


@pytest.fixture(scope="module")
def every(run):
    return studies.compare_every(run)


@pytest.fixture(scope="module")
def task(run):
    return tasks.load(run.config)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.slow
def test_a_pair_has_what_the_functions_say_of_its_two_steps(run, task):
    pair = studies.compare_pair(run, 3, 12)
    recipe = task.recipe()
    states = [dy.steps.reach(recipe, run, step, task.batch) for step in (3, 12)]
    matrices = pair.found["weights"].isel(site=pair.found["weights"]["level"].values == "matrices")
    alone = comparison.compare_weights(*states, recipe, sites.matrices(recipe.model))
    np.testing.assert_array_equal(matrices["distance"], alone["distance"])
    answers = comparison.compare_logits(*states, recipe, task.evaluation)
    np.testing.assert_array_equal(pair.found["sets"]["kl"], answers["kl"])
    integer = task.sets["Dt3"][0]
    rows = comparison.compare_rows(*states, recipe, task.questions(integer))
    asked = pair.found["questions"].sel(row=pair.found["questions"]["example_id"] == task.alias(integer))
    np.testing.assert_array_equal(asked["prediction_after"], rows["prediction_after"])
    first = tasks.in_order(task, task.questions(integer), "alias first")
    one = comparison.compare_logits(*states, recipe, {"": first})
    found = pair.found["orders"].sel(direction="alias first", example=f"alias {integer}")
    np.testing.assert_allclose(found["kl"], one["kl"][0], rtol=1e-6)


@pytest.mark.slow
def test_a_pairs_table_has_the_sets_and_the_aliases_most_changed_question(run, task):
    pair = studies.compare_pair(run, 0, 12)
    lines = pair.table.splitlines()
    dt3 = pair.found["sets"].sel(example="Dt3")
    (row,) = [line for line in lines if line.startswith("Dt3 ")]
    before, after = (f"{float(dt3[f'accuracy_{side}']):#.3g}" for side in ("before", "after"))
    assert row.split()[1:4] == [before, "→", after]
    logits = pair.found["logits"]
    change = np.abs(logits["accuracy_after"] - logits["accuracy_before"])
    top = logits["example"].values[np.lexsort((-logits["kl"], -change))[0]]
    listed = lines[lines.index("aliases whose answers changed most") + 2]
    assert listed.startswith(f"{top} ")
    integer = int(top.removeprefix("alias "))
    assert f"A{integer}" in listed
    assert "right: " in listed


@pytest.mark.slow
def test_asked_again_a_pair_is_read(run):
    pair = studies.compare_pair(run, 2, 4)
    before = times(pair.results)
    again = studies.compare_pair(run, 2, 4)
    assert times(pair.results) == before
    assert again.table == pair.table
    assert [path.name for path in pair.figures.iterdir()] == ["moved.png"]


@pytest.mark.slow
def test_every_checkpoint_has_its_curves_neighbours_and_updates(run, task, every):
    recipe = task.recipe()
    found = every.found
    assert found["scores"]["step"].values.tolist() == list(run.steps)
    assert found["sizes"]["step"].values.tolist() == list(run.steps[:-1])  # no step is taken from the end
    assert found["weights"]["step"].values.tolist() == list(run.steps[1:])
    assert found["updates"]["step"].values.tolist() == list(run.steps[2:])
    chosen = [sites.everything(recipe.model), *sites.components(recipe.model)]
    groups = comparison.align_groups(recipe, run.at(6), tasks.as_trained(task), chosen)
    for name, side in (("alignment", "base"), ("alignment-other-tag", "source")):
        alone = comparison.relations(groups, side)
        np.testing.assert_array_equal(found[name]["across"].sel(step=6), alone["across"])
    sizes = comparison.step_sizes(recipe, run.at(6), task.batch(6), sites.components(recipe.model))
    np.testing.assert_array_equal(found["sizes"]["effective_step"].sel(step=6), sizes["effective_step"])
    pair = studies.compare_pair(run, 4, 6)
    np.testing.assert_array_equal(
        found["patterns"]["divergence"].sel(step=6), pair.found["patterns"]["divergence"]
    )


@pytest.mark.slow
def test_every_checkpoint_is_drawn_and_told(every):
    drawn = {path.stem for path in every.figures.iterdir()}
    assert {"weights", "updates", "step-sizes", "effective-steps", "activations", "patterns"} < drawn
    assert {"role-to-tag", "role-to-alias", "role-previous-token", "alignment", "curves"} < drawn
    assert "alignment Dt3 − Df4" in every.table
    assert "accuracy Dt3 − Df4" in every.table
    weights = every.found["weights"]
    weights = weights.isel(site=weights["level"].values == "matrices")
    speed = weights["relative"] / (weights["step"] - weights["previous"])
    fastest = speed.isel(speed.argmax(["step", "site"]))
    first = every.table.splitlines()[every.table.splitlines().index("where weights moved fastest") + 2]
    assert first.split()[:2] == [str(int(fastest["previous"])), str(int(fastest["step"]))]
    assert str(fastest["site"].values) in first


@pytest.mark.slow
def test_a_comparison_that_is_a_link_out_of_the_run_is_refused(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns("results", "figures"))
    (folder / "results").mkdir()
    (folder / "results" / "compare-2-4").symlink_to(studies.compare_pair(run, 2, 4).results)
    with pytest.raises(ResultsError, match="leads out of the run's folder"):
        studies.compare_pair(Trajectory.open(folder), 2, 4)


@pytest.mark.slow
def test_other_steps_are_another_folder_and_may_be_unstored(run):
    three = studies.compare_every(run, [1, 5, 9])
    assert three.found["scores"]["step"].values.tolist() == [1, 5, 9]
    assert three.results.name.startswith("compare-every-3-")


def test_what_cannot_be_compared_says_why(run, tmp_path):
    with pytest.raises(TrajectoryError, match="at least 3"):
        studies.compare_every(run, [2, 4])
    torch.save({"w": torch.ones(2)}, tmp_path / "m_1.pt")
    imported = Trajectory.from_state_dicts(tmp_path / "m_1.pt", tmp_path / "imported")
    with pytest.raises(TrajectoryError, match=r"was imported.*dy\.compare"):
        studies.compare_pair(imported, 1, 1)


@pytest.mark.slow
def test_a_comparison_that_was_cut_off_is_made_whole(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns("results", "figures"))
    copied, save, saved = Trajectory.open(folder), dy.results.save, []

    def fails(dataset, path):
        if len(saved) == 2:
            raise OSError("no space left")
        saved.append(path)
        save(dataset, path)

    with monkeypatch.context() as patch:
        patch.setattr(dy.results, "save", fails)
        with pytest.raises(OSError, match="no space"):
            studies.compare_pair(copied, 2, 4)
    assert not (folder / "results" / "compare-2-4").exists()
    whole = studies.compare_pair(copied, 2, 4)
    assert set(whole.found) == {"weights", "logits", "activations", "patterns", "sets", "orders", "questions"}
    assert [path.name for path in whole.results.parent.iterdir()] == ["compare-2-4"]
