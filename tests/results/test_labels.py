"""No coordinate of a contrast or a site takes the name of what a result has already."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dynamics as dy
from dynamics import results

NET = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
RECIPE = dy.Recipe(NET, lambda model, x: model(x).mean(), partial(torch.optim.SGD, lr=0.1))
PAIR = dy.Contrast(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2), {"example": "one"})
SITES = dy.sites.parameters(NET)

COUNTED: list[int] = []


def measure(model: nn.Module, batch: Tensor) -> Tensor:
    COUNTED.append(1)
    return model(batch).mean()


TAKEN = [
    *("layer", "head", "component", "level"),
    *("site", "measure", "row", "other", "step", "seed", "factor", "direction", "optimizer"),
    *(
        "effect",
        "patched",
        "base",
        "source",
        "untouched",
        "coasted",
        "units",
        "attribution",
        "residual",
        "nodes",
    ),
]


@pytest.mark.parametrize("name", TAKEN)
def test_a_contrasts_coordinate_under_a_taken_name_is_refused_before_anything_runs(name: str) -> None:
    pair = replace(PAIR, coords={**PAIR.coords, name: 3})
    COUNTED.clear()
    for verb in (dy.patch_gradients, dy.patch_updates, dy.attribute_step, dy.comparison.align_gradients):
        with pytest.raises(ValueError, match=rf"'{name}' of a contrast .*such as 'contrast_{name}'"):
            verb(RECIPE, None, [pair], SITES, measure)
    assert COUNTED == []


@pytest.mark.parametrize("name", [name for name in TAKEN if name not in results.SITE_COORDS] + ["example"])
def test_a_sites_coordinate_under_a_taken_name_is_refused_before_anything_runs(name: str) -> None:
    odd = [replace(site, coords={**site.coords, name: 3}) for site in SITES]
    COUNTED.clear()
    for verb in (dy.patch_gradients, dy.attribute_step):
        with pytest.raises(ValueError, match=rf"'{name}' of a site .*such as 'site_{name}'"):
            verb(RECIPE, None, [PAIR], odd, measure)
    assert COUNTED == []


def test_a_coordinate_that_only_these_sites_have_is_refused_for_them_alone() -> None:
    pair = replace(PAIR, coords={**PAIR.coords, "index": 3})
    assert dy.patch_gradients(RECIPE, None, [pair], SITES, measure)["index"].dims == ("example",)
    with pytest.raises(ValueError, match=r"'index' of a contrast bears the name of a coordinate of sites"):
        dy.patch_gradients(RECIPE, None, [pair], dy.sites.rows(NET, "0.weight"), measure)


def test_activations_are_refused_alike() -> None:
    pair = replace(PAIR, coords={**PAIR.coords, "layer": 3})
    for verb in (dy.patch_activations, dy.attribute_activations):
        with pytest.raises(ValueError, match="'layer' of a contrast"):
            verb(RECIPE, None, [pair], dy.sites.activations(NET, "0"), measure)


def test_a_sites_coordinates_stand_in_the_result_beside_a_contrasts_own() -> None:
    pair = replace(PAIR, coords={**PAIR.coords, "contrast_layer": 7})
    sites = [replace(site, coords={**site.coords, "layer": 5}) for site in SITES]
    found = dy.patch_gradients(RECIPE, None, [pair], sites, measure)
    assert set(found["layer"].values) == {5}
    assert found["contrast_layer"].values.tolist() == [7]


def test_rows_of_a_batch_refuse_the_same_names() -> None:
    probe = replace(PAIR, coords={**PAIR.coords, "row": 3})
    with pytest.raises(ValueError, match="'row' of a contrast bears the name of a dim"):
        dy.attribute_examples(RECIPE, None, torch.ones(2, 2), [probe], measure)
