"""Sums over sites are sums over masks, however a site indexes its tensors."""

import numpy as np
import pytest
import torch

from dynamics.engine.site_sums import SiteSums, site_sums
from dynamics.sites import Site
from dynamics.trees import mask

SHAPES = {"a": (3, 4, 5), "b": (4, 2), "c": (6,), "d": ()}
INDICES = {
    "a": [
        ...,
        (),
        (1,),
        (-1, 2),
        (2, 3, -5),
        (slice(None), 1),
        (slice(None), slice(None), 4),
        (slice(1, 3),),
        (0, slice(0, 2), 3),
        (slice(0, 3), slice(1, 2)),
        (torch.tensor([0, 2, 0, -1]),),
        (slice(None), torch.tensor([3]), slice(0, 2)),
        torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.5,
    ],
    "b": [..., (3,), (slice(None), 1), (slice(0, 2), slice(None)), (2, 0)],
    "c": [..., (4,), (slice(1, None, 2),), (torch.tensor([5, 1]),)],
    "d": [..., ()],
}


def elements(seed):
    draws = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=draws, dtype=torch.float64) for n, shape in SHAPES.items()}


def by_masks(site, values):
    return sum(
        float(values[name][mask(index, values[name].shape, torch.device("cpu"))].sum())
        for name, index in site.covers.items()
        if name in values
    )


SITES = [
    *(Site(f"{n} {i}", {n: index}) for n, indices in INDICES.items() for i, index in enumerate(indices)),
    *(
        Site(f"pair {i} {j}", {"a": one, "b": other})
        for i, one in enumerate(INDICES["a"])
        for j, other in enumerate(INDICES["b"])
    ),
    Site("all", dict.fromkeys(SHAPES, ...)),
    Site("slices of three", {"a": (slice(0, 2),), "b": (slice(1, 3),), "c": (slice(0, 3),)}),
    Site("elsewhere", {"a": (1, 1, 1), "of another model": ...}),
    Site("nowhere", {"of another model": ...}),
]


def test_every_way_to_index_sums_what_its_mask_covers():
    sums = SiteSums(SITES, {n: torch.Size(shape) for n, shape in SHAPES.items()})
    for seed in (0, 1):
        values = elements(seed)
        expected = [by_masks(site, values) for site in SITES]
        np.testing.assert_allclose(sums(values), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_added_up_in_double_precision(dtype):
    values = {"a": torch.full((3, 4, 5), 0.1, dtype=dtype)}
    site = Site("all", {"a": ...})
    found = SiteSums([site], {"a": torch.Size((3, 4, 5))})(values)
    assert found.dtype == np.float64
    assert found[0] == pytest.approx(60 * float(torch.tensor(0.1, dtype=dtype)), rel=1e-14)


def test_sums_are_prepared_anew_for_other_sites_or_shapes():
    shapes = {n: torch.Size(shape) for n, shape in SHAPES.items()}
    first = site_sums(SITES, shapes)
    assert site_sums(list(SITES), dict(shapes)) is first
    assert site_sums(SITES[:1], shapes) is not first
    wider = {**shapes, next(iter(shapes)): torch.Size((7, 7, 7))}
    assert site_sums(SITES, wider) is not site_sums(SITES, shapes)
