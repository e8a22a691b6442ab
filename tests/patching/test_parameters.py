"""patch_parameters against weights swapped by hand, and against the identities of an exchange."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import dynamics as dy
from checkpoints import Checkpoint, CheckpointPair
from dynamics.engine import mixtures
from dynamics.patching import patch_parameters
from dynamics.recipe import RecipeError
from dynamics.sites import Site, SiteError
from tests.zoo.cases import first_quick
from tests.zoo.pair_models import (
    MODELS,
    batch_for,
    loaded,
    measure_for,
    measured,
    mixer,
    pair_of,
    right_logit,
    swapped,
)
from tests.zoo.small_models import classifier, classifier_recipe, margin, points, tokens, transformer

TRANSFORMERS = ("toy", "gpt2", "llama")

either_measure = pytest.mark.parametrize(
    "measure", first_quick([dy.measures.correct_logit, right_logit]), ids=["logits", "function"]
)


def sites_of(name: str, model: torch.nn.Module) -> list[Site]:
    if name in TRANSFORMERS:
        return [*dy.sites.heads(model)[-1:], *dy.sites.components(model)]
    return dy.sites.parameters(model)


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_the_base_with_the_sources_weights_swapped_in_by_hand(name):
    model = MODELS[name]()
    pair, measure = pair_of(model), measure_for(name)
    contrasts = [dy.Contrast(batch_for(name, 1)), dy.Contrast(None, None, batch_for(name, 2))]
    chosen = sites_of(name, model)
    found = patch_parameters(dy.Recipe(model), pair, contrasts, chosen, measure)
    for example, batch in enumerate((contrasts[0].base, contrasts[1].probe)):
        for i, site in enumerate(chosen):
            by_hand = measured(swapped(model, pair, site.covers), batch, measure)
            assert found["patched"].values[example, i] == pytest.approx(by_hand, abs=1e-12)
        for reference in ("base", "source"):
            whole = measured(loaded(model, getattr(pair, reference)), batch, measure)
            assert found[reference].values[example] == pytest.approx(whole, abs=1e-12)
    assert (np.abs(found["effect"]) > 1e-6).any("example").mean() > 0.9


@either_measure
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_pair_of_one_checkpoint_changes_nothing_exactly(name, measure):
    model = MODELS[name]()
    same = pair_of(model).source
    whole = dy.sites.components(model)
    chosen = [*whole, *dy.sites.at_positions(whole, {"first": 0, "others": [1, 2, -1]})]
    found = patch_parameters(
        dy.Recipe(model), CheckpointPair(same, same), [dy.Contrast(tokens(1))], chosen, measure
    )
    assert (found["effect"].values == 0).all()
    assert found["base"].equals(found["source"])


@pytest.mark.parametrize("name", MODELS)
def test_everything_exchanged_is_the_source_to_the_bit(name):
    model = classifier(norm=True) if name == "mlp" else MODELS[name]()
    pair = pair_of(model)
    seen = []

    def record(given, batch):
        tensors = (*given.named_parameters(), *given.named_buffers())
        seen.append({n: t.detach().clone() for n, t in tensors})
        return measure_for(name)(given, batch)

    everything = [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
    whole = Site("everything", dict.fromkeys(everything, ...))
    found = patch_parameters(dy.Recipe(model), pair, [dy.Contrast(batch_for(name, 1))], [whole], record)
    base, source, patched = seen
    for tensors, checkpoint in ((base, pair.base), (source, pair.source), (patched, pair.source)):
        recorded = {**checkpoint.parameters, **checkpoint.buffers}
        assert all(torch.equal(tensors[n], recorded[n]) for n in everything)
    assert found["patched"].item() == found["source"].item() != found["base"].item()


@either_measure
@pytest.mark.parametrize("name", ["toy", "mixer", "gpt2", "llama"])
def test_exchanged_at_all_positions_is_the_whole_layer(name, measure):
    model = MODELS[name]()
    chosen = sites_of(name, model)
    everywhere = dy.sites.at_positions(chosen, {"all": range(4)})
    sites = [*everywhere, *chosen]
    found = patch_parameters(dy.Recipe(model), pair_of(model), [dy.Contrast(tokens(1))], sites, measure)
    located, whole = np.split(found["patched"].values, 2, axis=1)
    np.testing.assert_allclose(located, whole, rtol=0, atol=1e-12)
    assert found["site"].values.tolist() == [site.label for site in sites]


def test_a_layer_at_some_positions_reads_what_the_hybrid_computes_there():
    """y[p] = W x[p] + 1[p in P] (W' − W) x[p] of both layers, written out."""
    model = mixer()
    pair = pair_of(model)
    b, s = pair.base.parameters, pair.source.parameters
    batch = tokens(5)
    both = Site("both", {n: ... for n in b if n.startswith(("up", "unembed"))})
    places = {"1 and last": [1, -1], "0": 0}
    chosen = dy.sites.at_positions([both], places)
    found = patch_parameters(dy.Recipe(model), pair, [dy.Contrast(batch)], chosen, right_logit)
    x = torch.nn.functional.layer_norm(
        b["embed.weight"][batch.tokens], (6,), b["norm.weight"], b["norm.bias"]
    )
    rows = torch.arange(len(batch))
    for site, positions in zip(chosen, ([1, 3], [0]), strict=True):
        here = torch.zeros(4, 1, dtype=torch.float64)
        here[positions] = 1
        up = x @ b["up.weight"].T + b["up.bias"]
        up = up + here * (x @ (s["up.weight"] - b["up.weight"]).T + s["up.bias"] - b["up.bias"])
        y = up.tanh() + up.tanh().mean(1, keepdim=True)
        out = y @ b["unembed.weight"].T + b["unembed.bias"]
        out = out + here * (
            y @ (s["unembed.weight"] - b["unembed.weight"]).T + s["unembed.bias"] - b["unembed.bias"]
        )
        by_hand = float(out[rows, batch.target_pos, batch.targets].mean())
        assert found["patched"].sel(site=site.label).item() == pytest.approx(by_hand, abs=1e-12)


def test_one_head_at_one_position_writes_what_the_source_head_would_there():
    model = transformer()
    pair = pair_of(model)
    batch = tokens(5)
    site = next(
        s for s in dy.sites.matrices(model) if "blocks.1.attn.W_V" in s.covers and s.coords["head"] == 1
    )
    (placed,) = dy.sites.at_positions([site], {"here": 2})
    found = patch_parameters(
        dy.Recipe(model), pair, [dy.Contrast(batch)], [placed], dy.measures.correct_logit
    )
    twin = loaded(model, pair.base)
    given = []
    twin.blocks[1].attn.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))

    def values(module, inputs, output):
        w, b = pair.source.parameters["blocks.1.attn.W_V"], pair.source.parameters["blocks.1.attn.b_V"]
        output = output.clone()
        output[:, 2, 1] = given[-1][:, 2] @ w[1] + b[1]
        return output

    twin.blocks[1].attn.hook_v.register_forward_hook(values)
    assert found["patched"].item() == pytest.approx(measured(twin, batch, right_logit), abs=1e-12)


def test_a_stack_of_models_measures_what_one_model_at_a_time_does():
    model = transformer()
    chosen = dy.sites.components(model)[2:5]
    chosen += dy.sites.at_positions(chosen, {"first": 0, "two": [1, 2], "none": []})
    contrasts = [dy.Contrast(tokens(1)), dy.Contrast(tokens(2))]
    recipe, pair = dy.Recipe(model), pair_of(model)
    found = patch_parameters(recipe, pair, contrasts, chosen, {"logit": dy.measures.correct_logit})
    slow = patch_parameters(
        recipe, pair, contrasts, chosen, {"logit": lambda m, b: float(right_logit(m, b).mean())}
    )
    assert "vmap over models" in found.attrs["provenance"]
    assert "one model at a time" in slow.attrs["provenance"]
    np.testing.assert_allclose(found["patched"], slow["patched"], rtol=0, atol=1e-12)
    nowhere = found["site"].str.endswith("@ none")
    assert nowhere.sum() == len(chosen) / 4
    assert (found["effect"].isel(site=nowhere) == 0).all()
    with dy.max_memory(1):
        one_by_one = patch_parameters(recipe, pair, contrasts, chosen, {"logit": dy.measures.correct_logit})
    np.testing.assert_allclose(one_by_one["patched"], slow["patched"], rtol=0, atol=1e-12)


def test_forward_passes_of_large_models_are_resumed_where_nothing_changed(monkeypatch):
    monkeypatch.setattr("dynamics.engine.measuring.is_large", lambda parameters: True)
    model = transformer()
    contrasts = [dy.Contrast(tokens(1)), dy.Contrast(tokens(2))]
    chosen = dy.sites.matrices(model)
    found = patch_parameters(dy.Recipe(model), pair_of(model), contrasts, chosen, dy.measures.correct_logit)
    assert "resumed from the first change" in found.attrs["provenance"]
    monkeypatch.undo()
    whole = patch_parameters(dy.Recipe(model), pair_of(model), contrasts, chosen, dy.measures.correct_logit)
    np.testing.assert_allclose(found["patched"], whole["patched"], rtol=0, atol=1e-12)


def test_buffers_are_the_bases_unless_a_site_covers_them():
    model = classifier(norm=True)
    state = Checkpoint.capture(model)
    with torch.no_grad():
        model.norm.running_mean += 1.0
    pair = CheckpointPair(state, Checkpoint.capture(model))
    chosen = [*dy.sites.parameters(model), Site("mean", {"norm.running_mean": ...})]
    found = patch_parameters(dy.Recipe(model), pair, [dy.Contrast(points(1))], chosen, margin)
    moved = found["site"].values[(found["effect"].values != 0)[0]].tolist()
    assert moved == ["mean"]
    assert found["patched"].sel(site="mean").item() == found["source"].item()


def test_necessity_is_the_reversed_pair():
    model = mixer()
    pair, chosen = pair_of(model), dy.sites.parameters(model)
    found = patch_parameters(dy.Recipe(model), pair.reversed(), [dy.Contrast(tokens(1))], chosen, right_logit)
    for site in chosen:
        rest = {n: ... for n in pair.base.parameters if n not in site.covers}
        by_hand = measured(swapped(model, pair, rest), tokens(1), right_logit)
        assert found["patched"].sel(site=site.label).item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.slow
def test_results_are_summarised_and_kept_like_those_of_other_verbs(tmp_path):
    model = transformer()
    pair = pair_of(model)
    pair.source.parameters["unembed.b_U"][3] += 5
    batches = [replace(tokens(i), targets=torch.full((6,), 3)) for i in range(6)]
    contrasts = [dy.Contrast(b, coords={"example": f"e{i}", "alias": i}) for i, b in enumerate(batches)]
    chosen = dy.sites.heads(model)
    found = patch_parameters(dy.Recipe(model), pair, contrasts, chosen, dy.measures.correct_logit)
    summary = dy.statistics.summarize(found)
    gap = float((found["source"] - found["base"]).mean())
    np.testing.assert_allclose(summary["recovery"], found["effect"].mean("example") / gap, rtol=1e-9)
    assert "recovery" in dy.statistics.table(summary)
    dy.results.save(found, tmp_path / "found.h5")
    assert dy.results.load(tmp_path / "found.h5").equals(found)
    dy.plots.heatmap(found, x="head", y="layer")


def test_the_users_model_and_checkpoints_are_left_as_they_were():
    model = transformer().train()
    pair = pair_of(model)
    before = Checkpoint.capture(model)
    kept = {n: t.clone() for n, t in pair.base.parameters.items()}
    chosen = dy.sites.at_positions(dy.sites.heads(model), {"first": 0})
    patch_parameters(dy.Recipe(model), pair, [dy.Contrast(tokens(1))], chosen, dy.measures.correct_logit)
    assert Checkpoint.capture(model).equals(before)
    assert model.training
    assert all(torch.equal(pair.base.parameters[n], t) for n, t in kept.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- refusals ---------------------------------------------------------------------------------------------


def test_what_is_no_pair_is_refused_with_how_to_make_one():
    recipe, chosen = classifier_recipe(), [Site("head", {"head.weight": ...})]
    state = Checkpoint.capture(recipe.model)
    for given in (state, None):
        with pytest.raises(
            TypeError, match=r"takes a pair of checkpoints second .*CheckpointPair\(base, source\)"
        ):
            patch_parameters(recipe, given, [dy.Contrast(points(1))], chosen, margin)
    pair = CheckpointPair(state, state)
    with pytest.raises(
        TypeError, match=r"patch_gradients takes a checkpoint .* CheckpointPair; give its base"
    ):
        dy.patch_gradients(recipe, pair, [dy.Contrast(points(1), points(2), points(3))], chosen, margin)


def test_a_pair_of_another_model_is_refused():
    with pytest.raises(RecipeError, match="does not fit the recipe's model"):
        patch_parameters(
            dy.Recipe(classifier()),
            pair_of(mixer()),
            [dy.Contrast(points(1))],
            [Site("head", {"head.weight": ...})],
            margin,
        )


def test_verbs_of_one_checkpoint_say_that_a_contrast_has_no_source():
    recipe = classifier_recipe()
    with pytest.raises(
        ValueError, match=r"patch_updates exchanges between two batches, and contrast 0 has no source"
    ):
        dy.patch_updates(
            recipe, None, [dy.Contrast(points(1), probe=points(2))], dy.sites.parameters(recipe.model), margin
        )


def test_a_position_that_the_sequence_has_not_is_refused_by_its_site():
    model = mixer()
    chosen = dy.sites.at_positions(dy.sites.parameters(model)[:1], {"far": 4})
    for measure in (right_logit, dy.measures.correct_logit):
        with pytest.raises(SiteError, match=r"'embed.weight @ far': 'embed' writes \(6, 4, 6\)"):
            patch_parameters(dy.Recipe(model), pair_of(model), [dy.Contrast(tokens(1))], chosen, measure)


def test_models_are_mixed_as_many_at_once_as_memory_allows(monkeypatch):
    model = transformer()
    sizes = []
    mixed = mixtures._mixed

    def counted(base, source, sites, space):
        sizes.append(len(sites))
        return mixed(base, source, sites, space)

    monkeypatch.setattr(mixtures, "_mixed", counted)
    chosen = dy.sites.matrices(model)
    arguments = dy.Recipe(model), pair_of(model), [dy.Contrast(tokens(1))], chosen, dy.measures.correct_logit
    patch_parameters(*arguments)
    assert sum(sizes) == len(chosen)
    assert max(sizes) > 1
    sizes.clear()
    with dy.max_memory(1):
        patch_parameters(*arguments)
    assert sizes == [1] * len(chosen)
