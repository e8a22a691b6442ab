"""Sparse gradients: exchanged, clipped and stepped with as training does."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dynamics as dy
from dynamics import sites
from dynamics.recipe import ByNorm
from dynamics.sites import Site
from dynamics.steps import NonFiniteGradient
from dynamics.steps.clipping import clipped
from dynamics.trees import exchanged, squared_norm
from tests.zoo.any_models import (
    N_WORDS,
    SPARSE,
    far,
    gradients_and_updates,
    slow_signal,
    slow_window,
    sparse,
    words,
)
from tests.zoo.small_models import (
    ADAMW,
    classifier_loss,
    draws,
    margin,
    outcomes,
    same,
)

sparse_optimizers = pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            name,
            marks=[pytest.mark.filterwarnings("ignore:Sparse invariant checks")]  # torch's own, in Adagrad
            if name == "Adagrad"
            else [],
        )
        for name in SPARSE
    ],
)


def sparse_pieces(model: nn.Module) -> list[Site]:
    scattered = torch.rand(N_WORDS, 4, generator=draws(0)) < 0.4
    return [
        Site("whole", {"embed.weight": ...}),
        Site("a row", {"embed.weight": (2,)}),
        Site("rows", {"embed.weight": (torch.tensor([1, 4, -1]),)}),
        Site("a column", {"embed.weight": (slice(None), 1)}),
        Site("a block", {"embed.weight": (slice(0, 6, 2), slice(1, 3)), "head.weight": (1,)}),
        Site("a mask", {"embed.weight": scattered}),
        Site("head", {"head.weight": ..., "head.bias": ...}),
        sites.everything(model),
    ]


@pytest.mark.slow
@sparse_optimizers
@pytest.mark.parametrize("clip", [None, ByNorm(0.05, over="optimizer")], ids=["unclipped", "by norm"])
@pytest.mark.parametrize("n", [1, 3])
def test_sparse_gradients_are_exchanged_as_in_a_loop_that_overwrites_grad(optimizer, clip, n):
    recipe, live = sparse(optimizer, clip)
    patched = sparse_pieces(recipe.model)
    window = dy.Contrast([words(10 + i) for i in range(n)], [words(20 + i) for i in range(n)], words(30))
    pair = dy.Contrast(window.base[0], window.source[0], window.probe)
    verb, given = (dy.patch_gradients, pair) if n == 1 else (dy.patch_window, window)
    found = outcomes(verb, recipe, live.last, given, patched)
    for site in patched:
        assert far(found[site.label], slow_window(recipe, live, window, site)) < 1e-13, site.label
        reached = site.label != "head" or optimizer != "SparseAdam"
        assert same(found[site.label], found["base"]) != reached


@gradients_and_updates
@sparse_optimizers
def test_sparse_patches_of_nothing_everything_and_unused_words_are_exact(verb, optimizer):
    recipe, live = sparse(optimizer, ByNorm(0.05))
    pair = dy.Contrast(*[(tokens.clamp(max=6), y) for tokens, y in (words(10), words(11))], words(12))
    patched = [
        Site("nothing", {"embed.weight": torch.zeros(N_WORDS, 4, dtype=torch.bool)}),
        Site("unused words", {"embed.weight": (slice(7, 9),)}),
        sites.everything(recipe.model),
    ]
    found = outcomes(verb, recipe, live.last, pair, patched)
    assert same(found["nothing"], found["base"])
    assert same(found["unused words"], found["base"])
    assert same(found["everything"], found["source"])
    assert not same(found["base"], found["source"])


@sparse_optimizers
def test_sparse_base_and_source_steps_are_those_of_training(optimizer):
    recipe, live = sparse(optimizer)
    pair = dy.Contrast(words(10), words(11), words(12))
    found = outcomes(dy.patch_gradients, recipe, live.last, pair, sparse_pieces(recipe.model))
    for name, batch in (("base", pair.base), ("source", pair.source)):
        after = dy.steps.replay(recipe, live.last, batch)
        assert far(found[name], after.parameters) < 1e-14


def test_a_sparse_and_a_dense_embedding_learn_the_same_under_sgd_at_every_site():
    recipe, live = sparse("SGD", ByNorm(0.05))
    dense = copy.deepcopy(recipe.model)
    dense.embed.sparse = False
    pair = dy.Contrast(words(10), words(11), words(12))
    patched = sparse_pieces(dense)
    one, other = (
        outcomes(dy.patch_gradients, replace(recipe, model=model), live.last, pair, patched)
        for model in (recipe.model, dense)
    )
    for label in one:
        assert far(one[label], other[label]) < 1e-15


def test_a_sparse_gradient_stays_sparse_with_each_word_once_and_sums_repeated_words():
    recipe, live = sparse()
    tokens = torch.tensor([[1, 1, 4], [4, 1, 8]])
    batch = tokens, torch.tensor([0, 2])
    found = dy.steps.gradient(recipe, live.last, batch).gradients["embed.weight"]
    assert found.is_sparse
    assert found.is_coalesced()
    assert found.indices().tolist() == [[1, 4, 8]]
    dense = copy.deepcopy(recipe.model)
    dense.embed.sparse = False
    expected = dy.steps.gradient(replace(recipe, model=dense), live.last, batch).gradients["embed.weight"]
    assert torch.allclose(found.to_dense(), expected, rtol=0, atol=1e-16)


def test_a_sparse_gradient_that_is_not_finite_is_named():
    def loss(model, batch):
        return classifier_loss(model, batch) + (model.embed(batch[0]) * 0).abs().sqrt().sum()

    recipe, live = sparse()
    with pytest.raises(NonFiniteGradient, match=r"gradient of embed\.weight for the batch at step 3"):
        dy.steps.gradient(replace(recipe, loss=loss), live.last, words(10))


def rows_of(tensor: Tensor) -> list[int]:
    assert tensor.is_coalesced()
    return tensor.indices()[0].tolist()


def table(rows: dict[int, list[float]], repeated: bool = False) -> Tensor:
    """A sparse [6, 2] tensor that stores the given rows, in halves where repeated."""
    places, values = list(rows), torch.tensor(list(rows.values()), dtype=torch.float64)
    if repeated:
        places, values = places * 2, torch.cat([values, values]) / 2
    return torch.sparse_coo_tensor(
        torch.tensor([places]), values, (6, 2), is_coalesced=not repeated, check_invariants=True
    )


BASE_ROWS = {0: [1.0, 2.0], 2: [3.0, 4.0], 3: [0.0, 6.0]}
SOURCE_ROWS = {1: [10.0, 20.0], 2: [30.0, 40.0], 4: [50.0, 60.0]}
BASE, SOURCE = table(BASE_ROWS), table(SOURCE_ROWS)


@pytest.mark.parametrize(
    ("index", "stored", "value"),
    [
        (..., [1, 2, 4], None),
        ((2,), [0, 2, 3], [[1, 2], [30, 40], [0, 6]]),
        ((0,), [2, 3], [[3, 4], [0, 6]]),  # the source does not store row 0: it is gone
        ((4,), [0, 2, 3, 4], [[1, 2], [3, 4], [0, 6], [50, 60]]),
        ((5,), [0, 2, 3], [[1, 2], [3, 4], [0, 6]]),
        ((slice(None), 1), [0, 1, 2, 3, 4], [[1, 0], [0, 20], [3, 40], [0, 0], [0, 60]]),  # 3 coasts
        ((slice(0, 3),), [1, 2, 3], [[10, 20], [30, 40], [0, 6]]),
        (torch.zeros(6, 2, dtype=torch.bool), [0, 2, 3], [[1, 2], [3, 4], [0, 6]]),
        (torch.ones(6, 2, dtype=torch.bool), [1, 2, 4], [[10, 20], [30, 40], [50, 60]]),
    ],
)
@pytest.mark.parametrize("repeated", [False, True])
def test_rows_are_stored_where_their_own_side_stores_them_by_hand(index, stored, value, repeated):
    base, source = table(BASE_ROWS, repeated), table(SOURCE_ROWS, repeated)
    before = base.to_dense(), source.to_dense()
    found = exchanged({"w": base, "v": None}, {"w": source, "v": None}, {"w": index})["w"]
    if value is None:
        assert found is source
    else:
        assert rows_of(found) == stored
        assert found.values().tolist() == value
    assert torch.equal(base.to_dense(), before[0])
    assert torch.equal(source.to_dense(), before[1])


def test_a_missing_sparse_gradient_counts_as_one_that_stores_nothing():
    none_here = exchanged({"w": None}, {"w": SOURCE}, {"w": (slice(0, 3),)})["w"]
    assert rows_of(none_here) == [1, 2]
    assert none_here.values().tolist() == [[10, 20], [30, 40]]
    none_there = exchanged({"w": BASE}, {"w": None}, {"w": (slice(0, 3),)})["w"]
    assert rows_of(none_there) == [3]
    assert exchanged({"w": BASE}, {"w": None}, {"w": ...})["w"] is None
    assert exchanged({"w": None}, {"w": None}, {"w": (0,)})["w"] is None


def test_a_sparse_gradient_exchanged_with_a_dense_one_is_dense():
    for base, source in ((BASE, SOURCE.to_dense()), (BASE.to_dense(), SOURCE)):
        found = exchanged({"w": base}, {"w": source}, {"w": (slice(None), 1)})["w"]
        expected = BASE.to_dense()
        expected[:, 1] = SOURCE.to_dense()[:, 1]
        assert not found.is_sparse
        assert torch.equal(found, expected)


def test_the_norm_of_a_sparse_gradient_is_that_of_its_sums_and_clipping_scales_it():
    for repeated in (False, True):
        g = table({0: [1.0, 2.0], 2: [3.0, -4.0]}, repeated)
        assert squared_norm(g) == 30.0
        found = clipped({"w": g, "b": torch.tensor([6.0]), "none": None}, ByNorm(1.0), ("w", "b", "none"))
        assert found["w"].is_sparse
        assert found["none"] is None
        assert torch.allclose(found["w"].to_dense(), g.to_dense() / (66**0.5 + 1e-6), rtol=1e-15)
        assert clipped({"w": g}, ByNorm(1e6), "w")["w"].to_dense().tolist() == g.to_dense().tolist()


@pytest.mark.parametrize("clip", [dy.ByValue(0.1), dy.ByNorm(0.1)])
def test_torchs_own_clipping_takes_no_sparse_gradients_and_by_value_neither_do_we(clip):
    recipe, live = sparse("SGD", clip)
    with pytest.raises(NotImplementedError, match="Sparse"):
        dy.steps.replay(recipe, live.last, words(10))
    pair = dy.Contrast(words(10), words(11), words(12))
    patched = sparse_pieces(recipe.model)
    if isinstance(clip, dy.ByValue):
        with pytest.raises(NotImplementedError, match="Sparse"):
            dy.patch_gradients(recipe, live.last, [pair], patched, margin)
    else:
        assert (dy.patch_gradients(recipe, live.last, [pair], patched, margin)["effect"] != 0).all()


def test_an_optimizer_that_takes_no_sparse_gradients_says_so_itself():
    recipe, _ = sparse()
    recipe = replace(recipe, optimizer=ADAMW)
    pair = dy.Contrast(words(10), words(11), words(12))
    for verb in (dy.patch_gradients, dy.patch_updates):
        with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
            verb(
                recipe,
                None,
                [pair],
                sites.parameters(recipe.model),
                margin,
            )


def test_sparseadam_moves_the_words_of_a_batch_alone_and_an_exchanged_row_with_its_moments():
    recipe, live = sparse("SparseAdam")
    base, source = torch.tensor([[0, 1, 2]]), torch.tensor([[2, 3, 4]])
    pair = dy.Contrast((base, torch.tensor([0])), (source, torch.tensor([1])), words(12))
    patched = [
        Site("3", {"embed.weight": (3,)}),
        Site("0", {"embed.weight": (0,)}),
        Site("column", {"embed.weight": (slice(None), 0)}),
    ]
    found = outcomes(dy.patch_gradients, recipe, live.last, pair, patched)
    before = live.last.parameters["embed.weight"]

    def moved(label):
        return (found[label]["embed.weight"] != before).any(1).nonzero().flatten().tolist()

    assert (moved("base"), moved("source")) == ([0, 1, 2], [2, 3, 4])
    assert (moved("3"), moved("0"), moved("column")) == ([0, 1, 2, 3], [1, 2], [0, 1, 2, 3, 4])


def test_coasting_lets_the_words_of_the_base_batch_coast_under_sparseadam():
    recipe, live = sparse("SparseAdam")
    pair = dy.Contrast(words(10), words(11), words(12))
    found = outcomes(dy.patch_gradients, recipe, live.last, pair, sites.parameters(recipe.model))
    model, optimizer = copy.deepcopy((live.model, live.optimizer))
    g = dy.steps.gradient(recipe, live.last, pair.base).gradients["embed.weight"]
    model.embed.weight.grad = g * 0.0
    optimizer.step()
    assert far({"w": found["coasted"]["embed.weight"]}, {"w": model.embed.weight}) < 1e-15


@pytest.mark.parametrize("call", ["factors", "positions"])
def test_sparse_gradients_have_factors_and_positions(call):
    recipe, live = sparse()
    pair = dy.Contrast(words(10), words(11), words(12))
    site = Site("embed", {"embed.weight": ...})
    if call == "factors":
        result = dy.patch_factors(recipe, live.last, [pair], [site], margin)
        whole = dy.patch_gradients(recipe, live.last, [pair], [site], margin)
        assert result["patched"].sel(factor="both").item() == pytest.approx(
            whole["patched"].item(), abs=1e-12
        )
    else:
        located = sites.at_positions([site], {"all": (0, 1, 2), "first": 0})
        result = dy.patch_gradients(recipe, live.last, [pair], [site, *located], margin)
        assert result["patched"].values[0, 1] == pytest.approx(result["patched"].values[0, 0], abs=1e-12)


def test_signals_go_through_a_sparse_embedding():
    recipe, live = sparse("SGD", ByNorm(0.05))
    pair = dy.Contrast(words(10), words(11), words(12))
    (site,) = sites.activations(recipe.model, "embed")
    found = outcomes(dy.patch_signals, recipe, live.last, pair, [site])[site.label]
    gradients = slow_signal(recipe, live, pair, "embed")
    assert far(found, dy.steps.step_from(recipe, live.last, gradients)) < 1e-14
