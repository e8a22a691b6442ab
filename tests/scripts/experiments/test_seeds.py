"""The table of seeds."""

import pandas as pd
import scipy.stats

from scripts.experiments import seeds


def test_the_table_of_seeds_holds_the_mean_over_seeds_with_its_interval():
    gaps = [0.1, 0.3, 0.2]
    rows = [
        {
            "train_multipliers": 4, "seed": i, "identified": 0.5, "weak": 0.1 * i, "strong": gap,
            "DtQ1": 0.9, "DfQ2": 0.8, "Dt3": 0.5, "Df4": 0.25,
        }
        for i, gap in enumerate(gaps)
    ]  # fmt: skip
    line = next(line for line in seeds.table(pd.DataFrame(rows)).splitlines() if line.startswith("| 4 |"))
    interval = scipy.stats.ttest_1samp(gaps, 0).confidence_interval()
    assert f"+0.20 [{interval.low:+.2f}, {interval.high:+.2f}]" in line
    assert "+0.10 +0.30 +0.20" in line
    assert "| 50% | 0.50 | 0.25 |" in line
