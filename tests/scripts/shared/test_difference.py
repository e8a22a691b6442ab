"""D, by hand: the logits of the right answers, from the whole sequences of the questions."""

import pytest
import torch

from dynamics.tasks import AliasTask
from scripts.shared.difference import difference


def test_the_difference_is_the_mean_correct_logit_of_dt3_less_that_of_df4(alias_config):
    task = AliasTask(alias_config)
    model = task.model().double()
    by_hand = {}
    for name in ("Dt3", "Df4"):
        asked = task.evaluation[name]
        logits = model(asked.tokens)
        rows = zip(logits, asked.target_pos, asked.targets, strict=True)
        by_hand[name] = torch.stack([row[pos, right] for row, pos, right in rows]).mean()
    measure, probe = difference(task)
    found = measure(model, probe)
    assert found.mean().item() == pytest.approx((by_hand["Dt3"] - by_hand["Df4"]).item(), abs=1e-12)
