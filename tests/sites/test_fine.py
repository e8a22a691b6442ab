"""Positions, neurons, rows, unions and complements."""

import numpy as np
import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site, SiteError
from tests.zoo.cases import first_quick
from tests.zoo.hugging_face import times_covered
from tests.zoo.output_models import ALL, MODELS, covered, every_model
from tests.zoo.signal_models import TOYS
from tests.zoo.small_models import (
    D_VOCAB,
    Tied,
    classifier,
    classifier_recipe,
    outcomes,
    points,
    same,
    tied,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)


def test_every_site_stands_once_at_every_position_with_all_else_its_own():
    given = sites.components(transformer())[:3]
    found = sites.at_positions(given, {"tag": 0, "rest": [1, 2], "last": -1, "range": range(1, 3)})
    assert [s.label for s in found] == [
        f"{s.label} @ {name}" for s in given for name in ("tag", "rest", "last", "range")
    ]
    for i, site in enumerate(found):
        own = given[i // 4]
        assert site.positions == ((0,), (1, 2), (-1,), (1, 2))[i % 4]
        assert site.covers == own.covers
        assert site.coords == {**own.coords, "position": ("tag", "rest", "last", "range")[i % 4]}
    assert all(s.positions is None and "position" not in s.coords for s in given)
    sites.check(found, transformer())


def test_no_sites_or_no_positions_are_no_sites():
    assert sites.at_positions([], {"tag": 0}) == []
    assert sites.at_positions(sites.components(transformer()), {}) == []


@pytest.mark.parametrize("where", [np.int64(2), torch.tensor(2), [np.int64(2)], np.array([2])])
def test_a_position_may_be_any_kind_of_whole_number(where):
    (found,) = sites.at_positions(sites.components(transformer())[:1], {"integer": where})
    assert found.positions == (2,)
    assert type(found.positions[0]) is int


@pytest.mark.parametrize("name", [n for n in TOYS if n != "attention only"])
def test_neurons_cover_all_of_an_mlp_but_its_output_bias_exactly_once(name):
    model = MODELS[name]()
    found = sites.neurons(model)
    assert [s.label for s in found] == [f"L{layer}N{i}" for layer in range(2) for i in range(12)]
    for site in found:
        layer, i = site.coords["layer"], site.coords["neuron"]
        assert site.label == f"L{layer}N{i}"
        assert site.coords == {
            "level": "neurons",
            "component": "neuron",
            "layer": layer,
            "head": -1,
            "neuron": i,
        }
    for parameter, count in times_covered(model, found).items():
        inside = ".mlp." in parameter and not parameter.endswith("b_out")
        assert (count == inside).all()
    sites.check(found, model)


def test_a_neuron_is_what_its_own_activation_is_made_of_and_what_it_writes():
    model, batch = transformer(), tokens(0)
    found = sites.neurons(model)[12 + 5]
    _, before = model.run_with_cache(batch.tokens)
    with torch.no_grad():
        for name, index in found.covers.items():
            model.get_parameter(name)[index] += 1.0
    _, after = model.run_with_cache(batch.tokens)
    hook = "blocks.1.mlp.hook_pre"
    differing = (before[hook] != after[hook]).flatten(0, 1).any(0)
    assert differing.nonzero().flatten().tolist() == [5]
    silent = transformer()
    with torch.no_grad():
        for name, index in found.covers.items():
            silent.get_parameter(name)[index] = 0.0
    lost = silent.run_with_cache(batch.tokens)[1]["blocks.1.hook_mlp_out"]
    mlp, post = transformer().blocks[1].mlp, before["blocks.1.mlp.hook_post"]
    torch.testing.assert_close(before["blocks.1.hook_mlp_out"] - lost, post[..., 5:6] * mlp.W_out[5].detach())


def test_a_gated_neuron_has_its_gate():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            mlp = nn.Module()
            for name, shape in {"W_in": (3, 4), "W_gate": (3, 4), "b_in": (4,), "b_gate": (4,)}.items():
                mlp.register_parameter(name, nn.Parameter(torch.zeros(shape)))
            mlp.W_out, mlp.b_out = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3))
            block = nn.Module()
            block.mlp = mlp
            self.blocks = nn.ModuleList([block])

    model = Gated()
    found = sites.neurons(model)
    assert len(found) == 4
    start = "blocks.0.mlp."
    assert found[2].covers == {
        f"{start}W_in": (ALL, 2),
        f"{start}W_gate": (ALL, 2),
        f"{start}b_in": (2,),
        f"{start}b_gate": (2,),
        f"{start}W_out": (2,),
    }
    assert {n: int(c.max()) for n, c in times_covered(model, found).items()} == {
        n: int(not n.endswith("b_out")) for n, _ in model.named_parameters()
    }


@pytest.mark.parametrize("name", ["attention only", "classifier", "GPT-2"])
def test_models_without_such_an_mlp_are_told_what_to_use(name):
    model = MODELS[name]()
    with pytest.raises(
        SiteError, match=r"no parameters named blocks\.0\.mlp\.W_in .* Use sites\.rows\(model, name\)"
    ):
        sites.neurons(model)


@every_model
def test_rows_of_every_parameter_with_axes_are_a_partition_of_it(name):
    model = MODELS[name]()
    for parameter, tensor in model.named_parameters():
        if tensor.ndim == 0:
            continue
        found = sites.rows(model, parameter)
        assert [s.label for s in found] == [f"{parameter} {i}" for i in range(len(tensor))]
        assert [s.coords["index"] for s in found] == list(range(len(tensor)))
        assert {(s.coords["level"], s.coords["component"]) for s in found} == {("rows", parameter)}
        numbers = [int(word) for word in parameter.split(".") if word.isdigit()]
        assert {s.coords["layer"] for s in found} == {*(numbers[:1] or [-1])}
        count = times_covered(model, found)
        assert (count.pop(parameter) == 1).all()
        assert not any(other.any() for other in count.values())
        sites.check(found, model)


def test_rows_of_what_is_not_there_or_has_no_axes_are_refused():
    model = classifier(norm=True)
    for name in ("temperature", "nothing", "norm.running_mean", "encoder"):
        with pytest.raises(
            SiteError, match=rf"Classifier has no parameter {name!r} with rows; it has temperature, "
        ):
            sites.rows(model, name)


def test_rows_of_a_tied_tensor_go_by_its_first_name():
    assert len(sites.rows(tied(), "embed.weight")) == D_VOCAB
    with pytest.raises(SiteError, match=r"no parameter 'unembed\.weight' with rows"):
        sites.rows(tied(), "unembed.weight")


def test_the_union_of_a_parameters_rows_is_patched_as_the_parameter_bitwise():
    recipe = transformer_recipe()
    live = trained(recipe, [tokens(0), tokens(1)])
    found = sites.rows(recipe.model, "embed.W_E")
    whole = Site("whole", {"embed.W_E": ...})
    pair = dy.Contrast(tokens(10), tokens(11), tokens(12))
    patched = [sites.union(recipe.model, found, "all rows"), whole, found[3]]
    after = outcomes(dy.patch_gradients, recipe, live.last, pair, patched)
    assert same(after["all rows"], after["whole"])
    assert not same(after["whole"], after["base"])
    moved = (after["embed.W_E 3"]["embed.W_E"] != after["base"]["embed.W_E"]).any(1)
    assert moved[3]


def made_of(name):
    """Sites of every kind that a model has: whole tensors, slices, single integers, masks."""
    model = MODELS[name]()
    found = sites.parameters(model)
    if name in TOYS or name == "GPT-2":
        found += [s for level in ("components", "heads", "matrices") for s in sites.LEVELS[level](model)]
    if name in TOYS and name != "attention only":
        found += sites.neurons(model)[::5]
    first = next(n for n, p in model.named_parameters() if p.ndim > 1)
    shape = model.get_parameter(first).shape
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found += [*sites.rows(model, first)[:2], Site("a mask", {first: drawn})]
    found.append(Site("columns", {first: (ALL, torch.tensor([0, shape[1] - 1]))}))
    return model, {s.label: s for s in found}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", first_quick(MODELS, 2))
def test_a_union_covers_exactly_what_any_of_its_sites_covers(name):
    model, known = made_of(name)
    labels = list(known)
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5):
        for _ in range(12):
            chosen = [known[labels[i]] for i in rng.permutation(len(labels))[:n]]
            found = sites.union(model, chosen)
            sites.check([found], model)
            expected = covered(model, chosen[0])
            for site in chosen[1:]:
                expected = {p: expected[p] | mine for p, mine in covered(model, site).items()}
            assert equal(covered(model, found), expected)
            assert all(covered(model, found)[p].any() for p in found.covers)


@pytest.mark.slow
@every_model
def test_a_complement_covers_exactly_the_rest_and_with_its_site_everything(name):
    model, known = made_of(name)
    for site in known.values():
        rest = sites.complement(model, site)
        mine, others = covered(model, site), covered(model, rest)
        assert all(torch.equal(others[p], ~mine[p]) for p in mine)
        assert set(rest.covers) == {p for p, other in others.items() if other.any()}
        assert rest.label == f"all but {site.label}"
        assert rest.coords == {
            "level": "complement", "component": f"all but {site.label}", "layer": -1, "head": -1,
        }  # fmt: skip
        both = sites.union(model, [site, rest])
        assert all(whole.all() for whole in covered(model, both).values())
        assert len(both.covers) == len(mine)


@every_model
def test_the_complement_of_a_complement_is_the_site(name):
    model, known = made_of(name)
    for site in list(known.values())[::3]:
        twice = sites.complement(model, sites.complement(model, site))
        assert equal(covered(model, twice), covered(model, site))


def test_a_tensor_covered_whole_by_slices_or_by_a_mask_is_not_in_the_complement():
    model = classifier()
    for index in ((ALL,), (slice(0, 8), ALL), torch.ones(8, 5, dtype=torch.bool), (torch.arange(8),)):
        rest = sites.complement(model, Site("whole", {"encoder.weight": index}))
        assert set(rest.covers) == {n for n, _ in model.named_parameters()} - {"encoder.weight"}


def test_buffers_are_in_a_union_and_never_in_a_complement():
    model = classifier(norm=True)
    mean = Site("mean", {"norm.running_mean": (slice(0, 3),)})
    more = Site("more", {"norm.running_mean": (slice(2, 5),)})
    both = sites.union(model, [mean, more]).covers["norm.running_mean"]
    assert both.tolist() == [True] * 5 + [False] * 3
    rest = sites.complement(model, mean)
    assert set(rest.covers) == {n for n, _ in model.named_parameters()}


def test_nothing_is_left_of_everything_and_no_verb_takes_it():
    model = classifier()
    rest = sites.complement(model, sites.everything(model))
    assert rest.covers == {}
    with pytest.raises(SiteError, match="'all but everything' covers nothing"):
        sites.check([rest], model)
    with pytest.raises(SiteError, match="covers nothing"):
        sites.complement(model, rest)


def test_the_complement_of_what_is_not_there_is_refused():
    with pytest.raises(SiteError, match=r"covers 'nothing', but the model has"):
        sites.complement(classifier(), Site("none", {"nothing": ...}))
    with pytest.raises(SiteError, match=r"covers 'unembed\.weight', but the model has embed\.weight"):
        sites.complement(tied(), Site("second name", {"unembed.weight": ...}))
    assert isinstance(tied(), Tied)


def test_a_complements_masks_are_its_own():
    mask = torch.eye(8, 5, dtype=torch.bool)
    site = Site("diagonal", {"encoder.weight": mask})
    sites.complement(classifier(), site).covers["encoder.weight"].fill_(False)
    assert torch.equal(site.covers["encoder.weight"], torch.eye(8, 5, dtype=torch.bool))


def test_the_complement_of_a_site_with_positions_is_refused_or_keeps_them():
    model = classifier()
    (located,) = sites.at_positions([Site("head", {"head.weight": ...})], {"first": 0})
    try:
        rest = sites.complement(model, located)
    except SiteError:
        return
    assert rest.positions == located.positions


@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])
@pytest.mark.parametrize("kind", ["transformer", "classifier"])
def test_a_site_and_its_complement_together_are_the_source_step_and_apart_they_are_not(verb, kind):
    recipe = transformer_recipe() if kind == "transformer" else classifier_recipe()
    draw = tokens if kind == "transformer" else points
    live = trained(recipe, [draw(0), draw(1)])
    model = recipe.model
    site = sites.heads(model)[1] if kind == "transformer" else Site("columns", {"encoder.weight": (ALL, 2)})
    rest = sites.complement(model, site)
    both = sites.union(model, [site, rest], "both")
    pair = dy.Contrast(draw(10), draw(11), draw(12))
    after = outcomes(verb, recipe, live.last, pair, [site, rest, both])
    assert same(after["both"], after["source"])
    for label in (site.label, rest.label):
        assert not same(after[label], after["source"])
        assert not same(after[label], after["base"])
    if verb is dy.patch_updates:
        inside = covered(model, site)
        for name, here in inside.items():
            assert torch.equal(
                after[site.label][name], torch.where(here, after["source"][name], after["base"][name])
            )
            assert torch.equal(
                after[rest.label][name], torch.where(here, after["base"][name], after["source"][name])
            )
