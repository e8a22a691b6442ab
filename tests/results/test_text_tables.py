"""Tables in plain text: no label is cut, numbers have three digits and align, intervals stand by themselves."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import xarray as xr

from dynamics import results, statistics
from dynamics.results.text_tables import aligned, interval, number

MATRICES = [f"blocks.{i}.attn.hook_result.W_{name}" for i in range(12) for name in "QKVO"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"),
        (-0.00748, "-0.00748"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (123.0, "123"),
        (1234.5, "1.23e+03"),
        (1.2e-7, "1.20e-07"),
        (0.0, "0.00"),
        (math.nan, "-"),
        (4510, "4510"),
    ],
)
def test_a_number_has_three_significant_digits_and_a_count_all(value: float, text: str) -> None:
    assert number(value) == text


def test_an_interval_without_a_bound_is_left_out() -> None:
    assert interval(-0.1, 20.0) == "[-0.100, 20.0]"
    assert interval(math.nan, 1.0) == interval(1.0, math.nan) == ""


def test_labels_stand_to_the_left_numbers_point_under_point_and_lines_are_of_one_width() -> None:
    assert aligned(
        [
            ["site", "effect", "", "step"],
            ["L0H0", 0.5, (0.25, 0.75), 7],
            ["a long label", -12.3, (math.nan, math.nan), 4510],
            ["b", 123.0, (-10.0, 1.0), 12],
            ["c", math.nan, (0.1, 1e-5), 0],
        ]
    ) == [
        "site           effect                     step",
        "L0H0            0.500  [0.250, 0.750]        7",
        "a long label  -12.3                       4510",
        "b             123      [-10.0, 1.00]        12",
        "c               -      [0.100, 1.00e-05]     0",
    ]


def test_a_table_without_rows_is_its_headings() -> None:
    assert aligned([["site", "effect"]]) == ["site  effect"]


def summary(labels: list[str], gap: float = 1.5) -> xr.Dataset:
    rng = np.random.default_rng(0)
    base = rng.normal(2, 1, 30)
    effect = rng.normal(0.3, 0.2, (30, len(labels)))
    found = results.effects(
        base[:, None] + effect,
        {"base": base, "source": base + rng.normal(gap, 0.5, 30)},
        {"example": [f"alias {i}" for i in range(30)]},
        {"site": labels},
        None,
        "logit",
        json.dumps({}),
    )
    return statistics.summarize(found)


def test_every_site_keeps_its_label_and_bars_go_first() -> None:
    for labels, bars in ((["a", "b"], True), (MATRICES, False), (["a" * 300, "b"], False)):
        text = statistics.table(summary(labels))
        assert {line.split()[0] for line in text.splitlines()[2:]} == set(labels)
        assert ("█" in text) == bars
        assert "…" not in text


def test_a_table_with_bars_is_at_most_a_hundred_wide_and_bars_go_at_once_beyond() -> None:
    found = summary(["x"])
    widths: dict[bool, list[int]] = {True: [], False: []}
    for n in range(1, 60):
        lines = statistics.table(found.assign_coords(site=["x" * n])).splitlines()[1:]
        assert len(set(map(len, lines))) == 1
        widths["█" in lines[1]].append(len(lines[0]))
    assert max(widths[True]) == 100
    assert min(widths[False]) == 100 - 10 - 2 + 1


def test_the_columns_of_a_summary_are_its_numbers() -> None:
    found = summary(["a", "b"])
    for line in statistics.table(found).splitlines()[2:]:
        site = found.sel(site=line.split()[0])
        texts = [
            number(float(site["effect"])),
            interval(float(site["effect_low"]), float(site["effect_high"])),
            number(float(site["recovery"])),
            interval(float(site["recovery_low"]), float(site["recovery_high"])),
            number(float(site["p"])),
            number(float(site["q"])),
        ]
        assert re.split(r"\s{2,}", line.rstrip("█ "))[1:] == texts


def test_the_first_line_says_of_what_kind_the_intervals_are() -> None:
    assert statistics.table(summary(["a"])).splitlines()[0].endswith(", 95 % intervals")
