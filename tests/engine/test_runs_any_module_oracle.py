"""Every verb on any module beside a training loop that overwrites what autograd leaves."""

import copy
from dataclasses import replace

import pytest
import torch

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.sites import Site, SiteError
from tests.zoo.any_models import (
    KINDS,
    VERBS,
    contrast_of,
    every_kind,
    far,
    made,
    sites_of,
    slow_signal,
    slow_window,
    usable,
)
from tests.zoo.small_models import (
    OPTIMIZERS,
    classifier,
    classifier_loss,
    margin,
    outcomes,
    points,
    same,
)

pytestmark = pytest.mark.slow


@every_kind
def test_patched_gradients_and_windows_are_those_of_a_loop_that_overwrites_grad(kind):
    recipe, live = made(kind)
    patched = sites_of("gradients", recipe.model)
    for verb in ("gradients", "window"):
        contrast = contrast_of(verb, kind)
        found = outcomes(VERBS[verb], recipe, live.last, contrast, patched)
        window = contrast if verb == "window" else dy.Contrast([contrast.base], [contrast.source])
        for site in patched:
            expected = slow_window(recipe, live, window, site)
            assert far(found[site.label], expected) < KINDS[kind].tolerance, (verb, site.label)


@every_kind
def test_patched_updates_are_selected_from_the_two_steps_bitwise(kind):
    recipe, live = made(kind)
    patched = sites_of("updates", recipe.model)
    found = outcomes(dy.patch_updates, recipe, live.last, contrast_of("updates", kind), patched)
    for site in patched:
        expected = {name: tensor.clone() for name, tensor in found["base"].items()}
        for name, index in site.covers.items():
            expected[name][index] = found["source"][name][index]
        assert same(found[site.label], expected)


@pytest.mark.parametrize("kind", [k for k in KINDS if usable("signals", k)])
def test_patched_signals_are_those_of_a_tensor_hook_that_returns_the_sources(kind):
    recipe, live = made(kind)
    patched = [
        site
        for site in sites_of("signals", recipe.model)
        if not (kind == "frozen" and site.label == "embed")  # its output has no gradient to hook
    ]
    contrast = contrast_of("signals", kind)
    found = outcomes(dy.patch_signals, recipe, live.last, contrast, patched)
    for site in patched:
        gradients = slow_signal(recipe, live, contrast, site.label)
        expected = dy.steps.step_from(recipe, live.last, gradients)
        # A bias before batch normalisation has no gradient but rounding, which AdamW's ε magnifies 10⁸ times.
        noise = {n for n, g in gradients.items() if g is not None and g.to_dense().abs().max() < 1e-15}
        sound, unsound = ({n: e for n, e in expected.items() if (n in noise) == x} for x in (False, True))
        assert far({n: found[site.label][n] for n in sound}, sound) < KINDS[kind].tolerance, site.label
        assert not unsound or far({n: found[site.label][n] for n in unsound}, unsound) < 1e-10, site.label


def test_factors_of_a_layer_are_products_of_what_it_read_and_of_the_signal_it_got_by_hand():
    recipe = dy.Recipe(classifier(dropout=0.3), classifier_loss, OPTIMIZERS["SGD"])
    checkpoint = Checkpoint.capture(recipe.model)
    runs = {}
    pair = dy.Contrast(points(10), points(11), points(12))
    for name, batch in (("base", pair.base), ("source", pair.source)):
        model, seen = copy.deepcopy(recipe.model), {}

        def keep(module, inputs, output, seen=seen):
            output.retain_grad()
            seen.update(x=inputs[0].detach(), output=output)

        model.head.register_forward_hook(keep)
        with checkpoint.random_state():
            classifier_loss(model, batch).backward()
        runs[name] = seen["x"], seen["output"].grad, {n: p.grad for n, p in model.named_parameters()}
    site = Site("head", {"head.weight": ...})
    seen = []

    def record(model, _):
        seen.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
        return torch.tensor(float(len(seen) - 1))

    result = dy.patch_factors(recipe, checkpoint, [pair], [site], record)
    (x_base, d_base, base), (x_source, d_source, _) = runs["base"], runs["source"]
    for factor, x, d in (
        ("x", x_source, d_base),
        ("delta", x_base, d_source),
        ("both", x_source, d_source),
    ):
        after = seen[int(result["patched"].sel(factor=factor).item())]
        gradients = base | {"head.weight": d.T @ x}
        expected = {n: checkpoint.parameters[n] - 0.1 * g for n, g in gradients.items()}
        assert far(after, expected) < 1e-14


@pytest.mark.parametrize("kind", [kind for kind in KINDS if usable("factors", kind)])
def test_both_factors_of_a_parameter_are_its_whole_gradient(kind):
    recipe, live = made(kind)
    patched = sites_of("factors", recipe.model)
    contrast = contrast_of("factors", kind)
    both, whole = (
        verb(recipe, live.last, [contrast], patched, KINDS[kind].measure)
        for verb in (dy.patch_factors, dy.patch_gradients)
    )
    assert both["factor"].values.tolist() == ["x", "delta", "both"]
    scale = float(abs(whole["patched"]).max())
    assert (
        float(abs(both["patched"].sel(factor="both") - whole["patched"]).max())
        < KINDS[kind].tolerance * scale
    )
    assert float(abs(both["effect"].sel(factor="x") - both["effect"].sel(factor="delta")).max()) > 0


@pytest.mark.parametrize(
    ("kind", "parameter"),
    [
        ("batch norm, dropout, a temperature", "temperature"),
        ("transformer layer", "middle.self_attn.in_proj_weight"),
        ("odd", "layers.0"),
        ("weight norm", "middle.bias"),
    ],
)
def test_a_gradient_that_no_factors_make_up_is_refused_by_name(kind, parameter):
    recipe, live = made(kind)
    with pytest.raises(SiteError, match=parameter):
        dy.patch_factors(
            recipe,
            live.last,
            [contrast_of("factors", kind)],
            [Site("it", {parameter: ...})],
            KINDS[kind].measure,
        )


def test_a_recurrent_layer_mixes_positions_so_its_gradient_is_no_sum_over_them():
    recipe, live = made("GRU")
    located = sites.at_positions([Site("gru", {"middle.weight_hh_l0": ...})], {"last": 2})
    with pytest.raises(SiteError, match="'middle' mixes positions"):
        dy.patch_gradients(recipe, live.last, [contrast_of("gradients", "GRU")], located, margin)


def test_positions_of_an_embedding_and_a_linear_layer_add_up_to_the_whole():
    recipe, live = made("GRU")
    recipe = replace(recipe, clip=None, optimizer=OPTIMIZERS["SGD"])
    checkpoint = Checkpoint.capture(live.model)
    whole = [Site("embed", {"embed.weight": ...}), Site("head", {"head.weight": ...})]
    located = sites.at_positions(whole, {f"{i}": i for i in range(3)})
    found = outcomes(
        dy.patch_gradients, recipe, checkpoint, contrast_of("gradients", "GRU"), [*whole, *located]
    )
    for site in whole:
        for name in site.covers:
            base = found["base"][name]
            total = sum(found[f"{site.label} @ {i}"][name] - base for i in range(3))
            assert torch.allclose(total, found[site.label][name] - base, rtol=0, atol=1e-14)
            assert all(not torch.equal(found[f"{site.label} @ {i}"][name], base) for i in range(3))


@pytest.mark.parametrize("call", ["factors", "positions"])
def test_a_frozen_parameter_has_no_factors_to_exchange(call):
    recipe, live = made("frozen")
    site = Site("embed", {"embed.weight": ...})
    contrast = contrast_of("factors", "frozen")
    if call == "factors":
        result = dy.patch_factors(recipe, live.last, [contrast], [site], margin)
    else:
        located = sites.at_positions([site], {"first": 0})
        result = dy.patch_gradients(recipe, live.last, [contrast], located, margin)
    assert (result["effect"] == 0).all()
