"""Measures: against numpy by hand, alone and many at once on one forward pass."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dynamics import measures
from dynamics.batch import Batch

LOGITS = np.random.default_rng(0).normal(size=(3, 4, 7)) * 3
BATCH = Batch(
    tokens=torch.zeros(3, 4, dtype=torch.int64),
    target_pos=torch.tensor([2, 0, 3]),
    targets=torch.tensor([6, 1, 1]),
    distractors=torch.tensor([[0, 1], [2, 6], [5, 5]]),
)
NAMES = ["correct_logit", "centred_logit", "correct_log_prob", "probability", "logit_difference"]


class Fixed(nn.Module):
    """Gives the same logits whatever it reads, and counts how often it is asked."""

    def __init__(self, logits: np.ndarray = LOGITS, wrapped: bool = False) -> None:
        super().__init__()
        self.logits, self.wrapped, self.n_forwards = torch.from_numpy(logits), wrapped, 0

    def forward(self, tokens):
        self.n_forwards += 1
        return SimpleNamespace(logits=self.logits) if self.wrapped else self.logits


def by_hand(name: str, row: int) -> float:
    """One row's value from the definition, one number at a time."""
    z = [float(value) for value in LOGITS[row, [2, 0, 3][row]]]
    correct = z[[6, 1, 1][row]]
    share = np.exp(correct) / sum(np.exp(value) for value in z)
    wrong = [z[i] for i in [[0, 1], [2, 6], [5, 5]][row]]
    return {
        "correct_logit": correct,
        "centred_logit": correct - sum(z) / 7,
        "correct_log_prob": np.log(share),
        "probability": share,
        "logit_difference": correct - (wrong[0] + wrong[1]) / 2,
    }[name]


@pytest.mark.parametrize("wrapped", [False, True], ids=["tensor", "output_with_logits"])
@pytest.mark.parametrize("name", NAMES)
def test_a_measure_equals_its_definition_row_by_row(name, wrapped):
    values = measures.by_name(name)(Fixed(wrapped=wrapped), BATCH)
    assert values.tolist() == pytest.approx([by_hand(name, row) for row in range(3)], rel=1e-12)


def test_target_logits_are_those_at_each_rows_scored_position():
    expected = np.stack([LOGITS[0, 2], LOGITS[1, 0], LOGITS[2, 3]])
    assert np.array_equal(measures.target_logits(Fixed(), BATCH).numpy(), expected)


def test_cross_entropy_is_minus_the_mean_log_probability_of_the_target():
    by_rows = [by_hand("correct_log_prob", row) for row in range(3)]
    assert float(measures.cross_entropy(Fixed(), BATCH)) == pytest.approx(-sum(by_rows) / 3, rel=1e-12)


@pytest.mark.parametrize(("name", "moves"), [(name, name == "correct_logit") for name in NAMES])
def test_only_the_bare_logit_moves_with_a_shift_of_all_logits(name, moves):
    measure = measures.by_name(name)
    difference = (measure(Fixed(LOGITS + 5), BATCH) - measure(Fixed(), BATCH)).tolist()
    assert difference == pytest.approx([5.0 * moves] * 3, abs=1e-12)


def test_log_probability_stays_finite_where_the_probability_vanishes():
    logits = np.zeros((3, 4, 7))
    logits[:, :, 0] = 2000.0
    assert measures.probability(Fixed(logits), BATCH).tolist() == [0.0] * 3
    assert measures.correct_log_prob(Fixed(logits), BATCH).tolist() == [-2000.0] * 3


def test_the_logit_difference_needs_wrong_answers_and_says_so():
    with pytest.raises(ValueError, match=r"logit_difference needs batch\.distractors \[rows, n\]"):
        measures.logit_difference(Fixed(), replace(BATCH, distractors=None))


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], NAMES[:1]])
def test_measures_of_the_logits_share_one_forward_and_equal_each_alone(names):
    model = Fixed()
    together = measures.evaluate({name: measures.by_name(name) for name in names}, model, BATCH)
    assert model.n_forwards == 1
    assert together.shape == (len(names),)
    alone = [measures.by_name(name)(Fixed(), BATCH).mean() for name in names]
    assert torch.equal(together, torch.stack(alone))


def test_a_function_of_ones_own_is_called_with_model_and_batch_beside_the_shared_forward():
    seen = []

    def own(model, batch):
        seen.append((model, batch))
        return torch.tensor(4.0, dtype=torch.float64)

    model = Fixed()
    values = measures.evaluate({"own": own, **{n: measures.by_name(n) for n in NAMES[:2]}}, model, BATCH)
    assert seen == [(model, BATCH)]
    assert model.n_forwards == 1
    assert values[0] == 4.0
    assert values[1] == measures.correct_logit(Fixed(), BATCH).mean()


def test_functions_of_ones_own_alone_cost_no_forward():
    model = Fixed()
    values = measures.evaluate({"rows": lambda m, b: torch.tensor([1.0, 2.0, 6.0])}, model, BATCH)
    assert values.tolist() == [3.0]
    assert model.n_forwards == 0


def test_a_measure_can_be_differentiated():
    model = Fixed()
    model.logits.requires_grad_(True)
    measures.evaluate({"x": measures.correct_logit}, model, BATCH).sum().backward()
    expected = np.zeros_like(LOGITS)
    expected[0, 2, 6] = expected[1, 0, 1] = expected[2, 3, 1] = 1 / 3
    assert np.allclose(model.logits.grad.numpy(), expected, rtol=0, atol=1e-15)


def test_measures_are_named_by_their_dict_their_name_or_their_function():
    def recall(model, batch):
        return torch.zeros(())

    assert measures.named({"a": recall, "b": measures.probability}) == {
        "a": recall,
        "b": measures.probability,
    }
    assert measures.named(measures.probability) == {"probability": measures.probability}
    assert measures.named(recall) == {"recall": recall}


def test_names_lead_to_measures_with_units_and_an_unknown_one_lists_them():
    assert [measures.by_name(name).name for name in NAMES] == NAMES
    assert {name: measures.by_name(name).units for name in NAMES} == {
        "correct_logit": "logit",
        "centred_logit": "logit",
        "correct_log_prob": "nat",
        "probability": "probability",
        "logit_difference": "logit",
    }
    with pytest.raises(ValueError, match=r"no measure 'loss'; there are accuracy, .*, probability\."):
        measures.by_name("loss")
