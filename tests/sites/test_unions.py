"""Unions of outputs: several heads, layers or positions exchanged at once, as a hook written by hand does it."""

import pytest
import torch

import dynamics as dy
from dynamics import measures, sites
from dynamics.measures import target_logits
from dynamics.sites import Site, SiteError
from dynamics.sites.site import is_partition
from tests.zoo.small_models import tokens, transformer

ALL = slice(None)
Z = "blocks.*.attn.hook_z"
PAIR = dy.Contrast(tokens(1, 4), tokens(2, 4))


@pytest.fixture(scope="module")
def model():
    return transformer()


def named(model, pattern, *by):
    found = sites.activations(model, pattern, by=("layer", *by), like=PAIR.base)
    return {site.label: site for site in found}


def zeroed(model, cuts):
    """The logits at the scored positions with the given slices of each hook at zero, by TransformerLens."""

    def zero(activation, hook):
        activation = activation.clone()
        for cut in cuts[hook.name]:
            activation[cut] = 0.0
        return activation

    with model.hooks(fwd_hooks=[(name, zero) for name in cuts]), torch.no_grad():
        return measures.correct_logit.from_logits(target_logits(model, PAIR.base), PAIR.base).mean().item()


def patched(model, site, values="zero"):
    found = dy.patch_activations(dy.Recipe(model), None, [PAIR], [site], measures.correct_logit, values)
    return float(found["patched"][0, 0])


@pytest.mark.parametrize(
    ("heads", "cuts"),
    [
        (["L0H0", "L0H1"], {0: [0, 1]}),
        (["L0H1", "L1H0"], {0: [1], 1: [0]}),
        (["L1H1", "L0H0", "L1H0"], {0: [0], 1: [0, 1]}),
    ],
)
def test_several_heads_are_ablated_at_once(model, heads, cuts):
    by_label = named(model, Z, "head")
    union = sites.union(model, [by_label[f"attn.z {head}"] for head in heads])
    by_hand = {f"blocks.{layer}.attn.hook_z": [(ALL, ALL, h) for h in hs] for layer, hs in cuts.items()}
    expected = zeroed(model, by_hand)
    assert abs(expected - zeroed(model, {})) > 1e-4
    assert patched(model, union) == pytest.approx(expected, abs=1e-6)


def test_positions_and_whole_outputs_are_joined_too(model):
    by_label = named(model, "blocks.*.hook_mlp_out", "pos")
    union = sites.union(model, [by_label["mlp_out 0 @0"], by_label["mlp_out 0 @2"]])
    expected = zeroed(model, {"blocks.0.hook_mlp_out": [(ALL, 0), (ALL, 2)]})
    assert patched(model, union) == pytest.approx(expected, abs=1e-6)
    whole = named(model, "blocks.*.hook_mlp_out")
    union = sites.union(model, [by_label["mlp_out 0 @0"], *whole.values()], "both MLPs")
    assert union.label == "both MLPs"
    expected = zeroed(model, {f"blocks.{layer}.hook_mlp_out": [...] for layer in (0, 1)})
    assert patched(model, union) == pytest.approx(expected, abs=1e-6)


def test_all_heads_together_bring_the_source_runs_answer_where_the_layers_do(model):
    heads, layers = (list(named(model, Z, *by).values()) for by in (("head",), ()))
    one, other = (patched(model, sites.union(model, chosen), "source") for chosen in (heads, layers))
    assert one == pytest.approx(other, abs=1e-6)
    assert one != pytest.approx(patched(model, layers[0], "source"), abs=1e-4)


def test_the_order_of_sites_and_joining_step_by_step_change_nothing(model):
    first, second, third, _ = named(model, Z, "head").values()
    at_once = sites.union(model, [first, second, third])
    later = sites.union(model, [third, sites.union(model, [second, first])])
    for name, index in at_once.covers.items():
        covered = [torch.zeros(4, 4, 2, dtype=torch.bool) for _ in range(2)]
        covered[0][index], covered[1][later.covers[name]] = True, True
        assert torch.equal(*covered)
        assert covered[0].any()


def test_cuts_along_two_axes_are_refused(model):
    by_label = named(model, Z, "head", "pos")
    with pytest.raises(SiteError, match=r"cuts that differ along one axis"):
        sites.union(model, [by_label["attn.z L0H0 @1"], by_label["attn.z L0H1 @2"]])
    with pytest.raises(SiteError, match=r"cuts that differ along one axis"):
        sites.union(model, [by_label["attn.z L0H0 @1"], *named(model, Z, "head").values()])


def test_slices_are_refused_and_what_is_no_submodule_is_named(model):
    name = "blocks.0.attn.hook_z"
    halves = [Site(str(i), {name: (ALL, slice(i, i + 1))}) for i in (0, 1)]
    with pytest.raises(SiteError, match=r"in whole numbers"):
        sites.union(model, halves)
    with pytest.raises(SiteError, match=r"covers 'blocks\.7\.attn\.hook_z', which is no submodule"):
        sites.union(model, [Site("none", {"blocks.7.attn.hook_z": ...})])


def test_sites_are_a_partition_where_every_trained_element_is_in_exactly_one():
    model = transformer()
    heads = sites.heads(model)
    assert is_partition(sites.components(model), model)
    assert is_partition(sites.matrices(model), model)
    assert is_partition(sites.parameters(model), model)
    assert not is_partition(sites.components(model)[1:], model)
    assert not is_partition([*sites.components(model), heads[0]], model)
    name, parameter = next(iter(model.named_parameters()))
    rest = [site for site in sites.parameters(model) if name not in site.covers]
    halves = [Site("first", {name: (0,)}), Site("rest", {name: (slice(1, None),)})]
    assert is_partition([*rest, *halves], model)
    assert not is_partition([*rest, halves[0]], model)
    parameter.requires_grad_(False)
    assert is_partition(rest, model)
