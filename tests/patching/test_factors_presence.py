"""Factors of layers that run twice, run in one of the runs only, or are frozen."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.sites import SiteError
from tests.zoo.signal_models import (
    RECIPES,
    REVEALING,
    contrast_of,
    covering,
    factored,
    made,
    off,
    revealed,
    revealed_factors,
    zero,
)
from tests.zoo.small_models import (
    ADAMW,
    same,
    tokens,
)

FACTORS = ("x", "delta", "both")


# --- layers that run twice, or in one of the runs only -----------------------------------------------------


def test_a_layer_that_runs_twice_has_the_sum_of_its_runs_and_stays_itself_at_positions():
    recipe, pair = RECIPES["odd"](), contrast_of("odd")
    site = covering("twice.weight", "twice.bias")
    located = sites.at_positions([site], {str(pos): pos for pos in range(4)})
    found = revealed_factors(recipe, None, pair, [site, *located])
    for factor in FACTORS:
        total = {n: sum(found[s.label, factor][n] - g for s in located) + g for n, g in found["base"].items()}
        assert off(total, found["layer", factor]) < 1e-13
    x = {run: [] for run in "bs"}
    kept = {}
    for run, batch in (("b", pair.base), ("s", pair.source)):
        kept[run] = dy.cache(recipe, None, batch)
        embedded = kept[run].activations["embed"]
        x[run] = [embedded, kept[run].activations["twice"].tanh()]
    for factor, (i, j) in {"x": ("s", "b"), "delta": ("b", "s"), "both": ("s", "s")}.items():
        deltas = [kept[j].signals["twice"], kept[j].signals["twice[1]"]]
        product = sum(torch.einsum("bpo,bpi->oi", d, r) for d, r in zip(deltas, x[i], strict=True))
        assert off({"": found["layer", factor]["twice.weight"]}, {"": product}) < 1e-13


class Experts(nn.Module):
    """Which of two layers runs, the batch decides."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.even = nn.Linear(5, 5)
        self.odd = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11)

    def forward(self, tokens):
        expert = self.odd if int(tokens.sum()) % 2 else self.even
        return self.head(expert(self.embed(tokens)))


def experts():
    recipe = dy.Recipe(made(Experts), dy.measures.cross_entropy, ADAMW)
    kinds = {}
    for seed in range(20):
        kinds.setdefault(int(tokens(seed).tokens.sum()) % 2, tokens(seed))
    return recipe, dy.Contrast(kinds[0], kinds[1], tokens(30))


def test_a_layer_that_runs_in_one_of_the_runs_only_has_no_corners():
    recipe, pair = experts()
    for contrast, counts in (
        (pair, "0 times in one run and 1 times"),
        (pair.reversed(), "1 times in one run and 0"),
    ):
        with pytest.raises(SiteError, match=f"'even' runs {counts}"):
            dy.patch_factors(recipe, None, [contrast], [covering("even.weight")], zero)


@pytest.mark.parametrize("name", ["odd.weight", "even.weight"])
def test_patching_all_positions_of_a_layer_that_only_one_run_has_is_patching_without_any(name):
    """In SGD, where a parameter whose gradient is zero stays as one that has none; others would let it coast."""
    recipe, pair = experts()
    patched = [covering(name), *sites.at_positions([covering(name)], {"all": range(4)})]
    plain = replace(recipe, optimizer=REVEALING)
    found = revealed(dy.patch_gradients, plain, None, pair, patched)
    assert off(found["layer @ all"], found["layer"]) < 1e-12


# --- frozen parameters ------------------------------------------------------------------------------------


def test_by_factor_a_frozen_parameter_does_not_move():
    recipe, pair = RECIPES["odd"](), contrast_of("odd")
    found = factored(recipe, None, pair, [covering("embed.weight")])
    assert all(same(found["layer", factor], found["base"]) for factor in FACTORS)


def test_at_positions_a_frozen_parameter_does_not_move():
    recipe, pair = RECIPES["odd"](), contrast_of("odd")
    located = sites.at_positions([covering("embed.weight")], {"some": [1, 2]})
    found = revealed(dy.patch_gradients, recipe, None, pair, located)
    assert off(found["layer @ some"], found["base"]) == 0


def test_a_frozen_parameter_in_a_site_leaves_the_clip_norm_alone():
    recipe = replace(RECIPES["odd"](), clip=dy.ByNorm(1e-3))
    pair, head = contrast_of("odd"), ("head.weight", "head.bias")
    one, other = (
        revealed_factors(recipe, None, pair, [covering(*names)]) for names in (head, (*head, "embed.weight"))
    )
    for factor in FACTORS:
        assert (
            off({n: other["layer", factor][n] for n in head}, {n: one["layer", factor][n] for n in head})
            < 1e-12
        )


def test_a_frozen_layer_between_others_does_not_stop_the_factors_below_it():
    recipe, pair = RECIPES["MLP"](), contrast_of("MLP")
    recipe.model.inner.requires_grad_(False)
    patched = [covering("lower.weight", "lower.bias", "upper.weight", "upper.bias")]
    found = revealed_factors(recipe, None, pair, patched)
    assert off(found["layer", "both"], found["source"]) < 1e-12
    assert not found["source"]["inner.weight"].any()
