"""Windows beside their floors."""

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory
from scripts.experiments import window_floor
from tests.scripts.calling import in_small, rows_of


def _fork(effect, noisy, random):
    """One component after ten steps, and the same a tenth as large after twenty."""
    scale = np.array([1.0, 0.1])
    return xr.Dataset(
        {
            "effect": (("step", "site"), (effect * scale)[:, None]),
            "noisy": (
                ("noise", "step", "site"),
                np.array([[n * np.ones(2)] for n in noisy]).transpose(0, 2, 1),
            ),
            "random": (
                ("placebo", "step", "site"),
                np.array([[r * np.ones(2)] for r in random]).transpose(0, 2, 1),
            ),
        },
        {"step": [10, 20], "site": ["embed"]},
    )


def test_a_component_is_told_where_the_mean_of_its_forks_exceeds_both_floors():
    """Noise of ±.1 has a standard deviation of .141, twice that is .283; placebos reach .25."""
    quiet = {"noisy": [-0.1, 0.1], "random": [0.25, -0.2]}
    above = [_fork(0.4, **quiet), _fork(0.3, **quiet)]
    below = [_fork(0.3, **quiet), _fork(0.2, **quiet)]
    away = [_fork(0.4, [-0.1, 0.1], [0.5, 0.0]), _fork(0.3, [-0.1, 0.1], [0.5, 0.0])]
    found = {1: above, 2: below, 3: away}
    assert window_floor.told(found).sel(site="embed", step=10).values.tolist() == [True, False, False]
    assert not window_floor.told(found).sel(step=20).any()
    with in_small(window_floor, AFTER=(10, 20)):
        rows = rows_of("\n".join(window_floor.table(found)))
    assert rows[-1] == ["embed", "1 of 3 [0.01, 0.91]", "0 of 3 [0.00, 0.71]"]


def test_effects_are_means_over_seeds_of_both_forks():
    """Seeds of .3 and .5: a mean of .4, and half an interval of 12.71 times .1 (t with one degree of freedom)."""
    quiet = {"noisy": [-0.1, 0.1], "random": [0.25, -0.3]}
    found = {1: [_fork(0.4, **quiet), _fork(0.2, **quiet)], 2: [_fork(0.9, **quiet), _fork(0.1, **quiet)]}
    with in_small(window_floor, AFTER=(10, 20)):
        rows = rows_of("\n".join(window_floor.table_of_effects(found)))
    assert rows[-1] == ["embed", "+0.40 [-0.87, +1.67]", "+0.04 [-0.09, +0.17]"]


def test_sizes_are_medians_over_seeds_and_forks():
    quiet = {"noisy": [-0.1, 0.1], "random": [0.25, -0.3]}
    found = {1: [_fork(-0.4, **quiet), _fork(0.3, **quiet)], 2: [_fork(0.9, **quiet), _fork(0.1, **quiet)]}
    with in_small(window_floor, AFTER=(10, 20)):
        rows = rows_of("\n".join(window_floor.table_of_sizes(found)))
    assert [row[1:] for row in rows[-3:]] == [["0.35", "0.035"], ["0.14", "0.14"], ["0.3", "0.3"]]


@pytest.mark.slow
def test_windows_and_their_floors_are_what_the_verb_gives(alias_runs):
    run = Trajectory.open(alias_runs[0])
    task = dy.tasks.load(run.config)
    with in_small(window_floor, N_NOISE=2, N_PLACEBOS=2):
        found = window_floor.floors(task, run, (1, 2))
        window_floor.draw({1: [found, found]})
    recipe, start = task.recipe(), run.at(task.config.phases.starts["x2"])
    measure, probe = window_floor.difference(task)
    base = [task.batch(start.step + n) for n in range(2)]
    contrast = dy.Contrast(base, list(map(task.retag, base)), probe)
    (site,) = [s for s in dy.sites.components(recipe.model) if s.label == "attn 0"]
    for state, values in (
        (start, found["effect"]),
        (dy.comparison.perturbed(start, 1), found["noisy"].isel(noise=1)),
    ):
        alone = dy.patch_window(recipe, state, [contrast], [site], measure)["effect"]
        assert float(values.sel(step=2, site="attn 0")) == pytest.approx(float(alone.squeeze()), abs=1e-5)
    assert found["random"].notnull().any()
