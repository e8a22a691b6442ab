"""Truths about factors and positions that need no second implementation."""

import dataclasses

import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site
from tests.zoo.signal_models import (
    COARSE,
    RECIPES,
    TOYS,
    batch_of,
    begun,
    contrast_of,
    factored,
    largest,
    less,
    off,
    revealed,
    revealed_factors,
    scored_at,
    tolerance_of,
    toy_recipe,
)
from tests.zoo.small_models import ADAMW, CLIPS, outcomes, same, tokens

pytestmark = pytest.mark.slow

FACTORS = ("x", "delta", "both")
SEQUENCES = [*TOYS, "tied", "GPT-2", "GPT-NeoX", "Llama"]


def trainable(recipe):
    unused = ("idle", "aside")
    named = recipe.model.named_parameters()
    return [n for n, p in named if p.requires_grad and not n.startswith(unused)]


def each(recipe):
    return [Site(n, {n: ...}) for n in trainable(recipe)]


def whole(recipe):
    return Site("whole", dict.fromkeys(trainable(recipe), ...))


def minus(one, other):
    return {n: one[n] - other[n] for n in one}


def plus(*many):
    return {n: sum(gradients[n] for gradients in many) for n in many[0]}


# --- oneself, both, everything ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_batch_whose_factors_are_exchanged_with_its_own_moves_nothing_to_the_bit(name):
    """Also where base and source are equal batches and not the same one."""
    recipe = RECIPES[name]()
    pair = dy.Contrast(batch_of(name, 10), batch_of(name, 10), batch_of(name, 12))
    checkpoint, patched = begun(recipe, name).last, [*each(recipe)[::6], whole(recipe)]
    found = factored(recipe, checkpoint, pair, patched)
    assert all(same(found[s.label, factor], found["base"]) for s in patched for factor in FACTORS)
    assert not same(found["untouched"], found["base"])
    if name in SEQUENCES:
        located = sites.at_positions([whole(recipe)], {"one": 1, "rest": [0, 2, 3]})
        found = outcomes(dy.patch_gradients, recipe, checkpoint, pair, located)
        assert all(same(found[s.label], found["base"]) for s in located)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_effect_of_exchanging_a_batch_with_itself_is_zero_through_clipping_and_optimizer(clip):
    recipe = toy_recipe(optimizer=ADAMW, clip=CLIPS[clip])
    batch = tokens(2)
    pair, measure = dy.Contrast(batch, batch, tokens(4)), dy.measures.correct_logit
    result = dy.patch_factors(recipe, begun(recipe).last, [pair], sites.heads(recipe.model), measure)
    assert (result["effect"] == 0).all()
    assert (result["source"] == result["base"]).all()
    assert (result["untouched"] != result["base"]).all()


@pytest.mark.parametrize("name", RECIPES)
def test_both_factors_of_a_parameter_are_its_gradient_and_of_all_of_them_the_source_step(name):
    recipe, pair = RECIPES[name](), contrast_of(name)
    checkpoint, patched = begun(recipe, name).last, [*each(recipe)[::3], whole(recipe)]
    by_factor = revealed_factors(recipe, checkpoint, pair, patched)
    plain = revealed(dy.patch_gradients, recipe, checkpoint, pair, patched)
    scale = largest(plain["source"])
    for site in patched:
        assert off(by_factor[site.label, "both"], plain[site.label], scale) < tolerance_of(name), site.label
    assert off(by_factor["whole", "both"], plain["source"]) < tolerance_of(name)
    assert off(plain["base"], plain["source"]) > 1e-2


@pytest.mark.parametrize("name", SEQUENCES)
def test_patching_all_positions_is_patching_without_any(name):
    recipe, pair = RECIPES[name](), contrast_of(name)
    patched = [*each(recipe)[::5], whole(recipe)]
    located = sites.at_positions(patched, {"all": range(4)})
    found = revealed(dy.patch_gradients, recipe, None, pair, [*patched, *located])
    by_factor = revealed_factors(recipe, None, pair, [*patched, *located])
    for site, at in zip(patched, located, strict=True):
        assert off(found[at.label], found[site.label]) < tolerance_of(name)
        for factor in FACTORS:
            assert off(by_factor[at.label, factor], by_factor[site.label, factor]) < tolerance_of(name)


# --- sums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEQUENCES)
def test_what_the_positions_contribute_adds_up_to_the_whole_factor_by_factor(name):
    recipe, pair = RECIPES[name](), contrast_of(name)
    everywhere = whole(recipe)
    located = sites.at_positions([everywhere], {"0": 0, "1": 1, "2": -2, "3": 3})
    found = revealed_factors(recipe, None, pair, [everywhere, *located])
    base, scale = found["base"], largest(found["base"])
    for factor in FACTORS:
        total = plus(*(minus(found[site.label, factor], base) for site in located))
        expected = minus(found["whole", factor], base)
        assert off(total, expected, scale) < tolerance_of(name)
        assert largest(expected) > 1e-3 * scale
    located_alone = revealed(dy.patch_gradients, recipe, None, pair, located)
    total = plus(*(minus(located_alone[site.label], base) for site in located))
    assert off(total, minus(found["source"], base), scale) < tolerance_of(name)


@pytest.mark.parametrize("part", ["W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"])
def test_what_the_heads_contribute_adds_up_to_the_whole_matrix(part):
    recipe, pair = toy_recipe(), contrast_of("LN gelu")
    name = f"blocks.1.attn.{part}"
    heads = [Site(f"head {h}", {name: (h,)}) for h in range(2)]
    patched = [Site("whole", {name: ...}), *heads]
    patched += sites.at_positions(patched, {"1": 1})
    found = revealed_factors(recipe, None, pair, patched)
    scale = largest(found["base"])
    for at in ("", " @ 1"):
        for factor in FACTORS:
            changes = [minus(found[f"head {h}{at}", factor], found["base"]) for h in range(2)]
            expected = minus(found[f"whole{at}", factor], found["base"])
            assert off(plus(*changes), expected, scale) < 1e-15


LINEAR = {
    "LN gelu": ["blocks.*.attn.*", "blocks.*.mlp.*", "unembed.*"],
    "GPT-NeoX": ["*query_key_value*", "*dense*", "lm_head*"],
    "MLP": ["lower.*", "inner.*", "upper.*"],
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_four_corners_close_with_the_interaction_of_both_differences(name):
    """δ_R x_R − δ_U x_U = (δ_R − δ_U) x_U + δ_U (x_R − x_U) + (δ_R − δ_U)(x_R − x_U), the last made by hand."""
    recipe, pair = RECIPES[name](), contrast_of(name)
    layer = {"LN gelu": "blocks.0.mlp", "GPT-NeoX": "gpt_neox.layers.0.mlp.dense_h_to_4h", "MLP": "inner"}[
        name
    ]
    weight = {"LN gelu": f"{layer}.W_in"}.get(name, f"{layer}.weight")
    writes = f"{layer}.hook_pre" if name == "LN gelu" else layer
    runs = []
    for batch in (pair.base, pair.source):
        read = []
        handle = recipe.model.get_submodule(layer).register_forward_pre_hook(
            lambda _, inputs, read=read: read.append(inputs[0].detach())
        )
        signal = dy.cache(recipe, None, batch, writes).signals[writes]
        handle.remove()
        runs.append((read[0].flatten(0, -2), signal.flatten(0, -2)))
    (x, delta), (other_x, other_delta) = runs
    interaction = (other_delta - delta).T @ (other_x - x)
    if name == "LN gelu":
        interaction = interaction.T
    everything = sites.matching(recipe.model, {"linear": LINEAR[name]})
    found = revealed_factors(recipe, None, pair, everything)
    base = found["base"][weight]
    x_term, delta_term, both = (found["linear", factor][weight] - base for factor in FACTORS)
    assert off({"": both}, {"": x_term + delta_term + interaction}) < tolerance_of(name)
    assert float(interaction.abs().max()) > 1e-2 * float(both.abs().max())
    assert float(x_term.abs().max()) > 1e-2 * float(both.abs().max())


@pytest.mark.parametrize("name", ["LN gelu", "MLP", "LSTM", "convolutions", "tied", "Llama"])
def test_the_sources_x_with_the_bases_delta_is_the_reversed_contrasts_delta_factor(name):
    recipe, pair = RECIPES[name](), contrast_of(name)
    site = whole(recipe)
    there = revealed_factors(recipe, None, pair, [site])
    back = revealed_factors(recipe, None, pair.reversed(), [site])
    for one, other in (("x", "delta"), ("delta", "x")):
        assert off(there["whole", one], back["whole", other]) < tolerance_of(name)
    assert off(there["whole", "x"], there["whole", "delta"]) > 1e-2


@pytest.mark.parametrize("name", ["LN gelu", "RMS relu", "MLP", "GPT-2"])
def test_a_bias_and_a_positional_embedding_read_nothing_so_their_x_makes_no_difference(name):
    recipe, pair = RECIPES[name](), contrast_of(name)
    biases = [s for s in each(recipe) if ".b" in s.label or "W_pos" in s.label or "wpe" in s.label]
    assert len(biases) > 2
    found = factored(recipe, None, pair, biases)
    for site in biases:
        assert same(found[site.label, "x"], found["base"])
        gap = less({**found, "untouched": found[site.label, "both"]}, recipe.model)
        assert largest(gap[site.label, "delta"]) < 1e-15


# --- positions of a causal transformer --------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TOYS, *COARSE])
def test_positions_after_the_loss_contribute_exactly_nothing(name):
    """Under causal masking; so does the term of the inputs there, though the tokens differ."""
    recipe, pair = RECIPES[name](), contrast_of(name)
    pair = dy.Contrast(scored_at(pair.base, 1), scored_at(pair.source, 1), pair.probe)
    assert (pair.base.tokens[:, 2:] != pair.source.tokens[:, 2:]).any()
    located = sites.at_positions([whole(recipe)], {"2": 2, "after": [2, 3], "at": 1})
    found = factored(recipe, None, pair, located)
    gradients = revealed(dy.patch_gradients, recipe, None, pair, located)
    for factor in FACTORS:
        assert same(found["whole @ 2", factor], found["base"])
        assert same(found["whole @ after", factor], found["base"])
        assert not same(found["whole @ at", factor], found["base"])
    assert off(gradients["whole @ after"], gradients["base"]) == 0
    assert off(gradients["whole @ at"], gradients["base"]) > 1e-3


@pytest.mark.parametrize("name", TOYS)
def test_before_the_first_attention_x_differs_only_where_the_tokens_do(name):
    recipe, batch = toy_recipe(name), scored_at(tokens(10), 3)
    changed = batch.tokens.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 11
    pair = dy.Contrast(batch, dataclasses.replace(batch, tokens=changed), tokens(12))
    first = ["embed.*", "pos_embed.*", "blocks.0.attn.?_[QKV]"]
    if name in ("LN gelu", "RMS relu"):
        first.append("blocks.0.ln1.*")
    patched = sites.matching(recipe.model, {"before": first, "after": ["blocks.0.attn.W_O", "unembed.*"]})
    patched += sites.at_positions(patched, {str(pos): pos for pos in range(4)})
    found = revealed_factors(recipe, None, pair, patched)
    scale = largest(found["base"])
    for pos in (0, 2, 3):
        assert off(found[f"before @ {pos}", "x"], found["base"]) == 0
        assert off(found[f"before @ {pos}", "delta"], found["base"], scale) > 1e-4
    assert off(found["before @ 1", "x"], found["before", "x"]) < 1e-13
    assert off(found["before @ 1", "x"], found["base"], scale) > 1e-4
    assert off(found["after @ 3", "x"], found["base"], scale) > 1e-4
    assert off(found["after @ 0", "x"], found["base"]) == 0  # nothing before it differs


def test_rows_of_the_embedding_get_what_their_token_brings_at_that_position():
    """By hand: the signals at a position, added up over the rows in which it holds the token."""
    recipe, pair = toy_recipe(), contrast_of("LN gelu")
    runs = [(b.tokens, dy.cache(recipe, None, b, "embed").signals["embed"]) for b in (pair.base, pair.source)]
    token = int(pair.source.tokens[0, 1])
    row = Site("row", {"embed.W_E": (token,)})
    found = revealed_factors(recipe, None, pair, sites.at_positions([row], {"1": 1}))

    def brought(x, delta):
        return (runs[delta][1][:, 1] * (runs[x][0][:, 1] == token)[:, None]).sum(0)

    for factor, (x, delta) in {"x": (1, 0), "delta": (0, 1), "both": (1, 1)}.items():
        expected = found["base"]["embed.W_E"].clone()
        expected[token] += brought(x, delta) - brought(0, 0)
        assert off({"": found["row @ 1", factor]["embed.W_E"]}, {"": expected}) < 1e-13


# --- tied embeddings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "embed", "unembed"), [("tied", "embed", "unembed"), ("GPT-2", "transformer.wte", "lm_head")]
)
def test_the_two_uses_of_a_tied_tensor_add_up(name, embed, unembed):
    recipe, pair = RECIPES[name](), contrast_of(name)
    owner = recipe.model.get_submodule
    weight = f"{embed}.weight"
    runs = []
    for batch in (pair.base, pair.source):
        read = []
        handle = owner(unembed).register_forward_pre_hook(
            lambda _, inputs, read=read: read.append(inputs[0].detach())
        )
        signals = dy.cache(recipe, None, batch).signals
        handle.remove()
        runs.append((batch.tokens, signals[embed], read[0], signals[unembed]))

    def made_of(x, delta, at):
        rows = torch.zeros_like(owner(embed).weight)
        for token, signal in zip(
            runs[x][0][:, at].flatten(), runs[delta][1][:, at].flatten(0, 1), strict=True
        ):
            rows[token] += signal
        return rows + torch.einsum("bpo,bpi->oi", runs[delta][3][:, at], runs[x][2][:, at])

    site = Site("tied", {weight: ...})
    located = sites.at_positions([site], {"some": [1, 2]})
    found = revealed_factors(recipe, None, pair, [site, *located])
    for label, at in (("tied", [0, 1, 2, 3]), ("tied @ some", [1, 2])):
        for factor, (x, delta) in {"x": (1, 0), "delta": (0, 1), "both": (1, 1)}.items():
            expected = found["base"][weight] - made_of(0, 0, at) + made_of(x, delta, at)
            assert off({"": found[label, factor][weight]}, {"": expected}) < tolerance_of(name)


# --- bookkeeping ------------------------------------------------------------------------------------------


def test_sites_and_contrasts_in_one_call_give_the_bits_of_calls_one_by_one():
    recipe = toy_recipe(optimizer=ADAMW, clip=CLIPS["by norm"])
    checkpoint = begun(recipe).last
    pairs = [dy.Contrast(tokens(i), tokens(i + 1), tokens(i + 2), {"example": f"{i}"}) for i in (2, 5)]
    pairs.append(dataclasses.replace(pairs[0], probe=tokens(9), coords={"example": "another probe"}))
    patched = sites.heads(recipe.model)
    patched += sites.at_positions(patched, {"tag": 0, "rest": [1, 2, 3]})
    measures = {m.name: m for m in (dy.measures.correct_logit, dy.measures.correct_log_prob)}
    many = dy.patch_factors(recipe, checkpoint, pairs, patched, measures)
    assert set(many["effect"].dims) == {"example", "site", "factor", "measure"}
    for pair in pairs:
        for site in patched[::5]:
            one = dy.patch_factors(recipe, checkpoint, [pair], [site], measures)
            for name in ("patched", "effect", "base", "source", "untouched", "coasted"):
                there = many[name].sel(example=pair.coords["example"])
                there = there.sel(site=site.label) if "site" in there.dims else there
                here = one[name].squeeze("example", drop=True)
                here = here.squeeze("site", drop=True) if "site" in here.dims else here
                assert (there.transpose(*here.dims).values == here.values).all(), name
    assert (many["effect"] == many["patched"] - many["base"]).all()


def test_sites_keep_their_coordinates_and_the_position_its_name():
    recipe = toy_recipe()
    heads = sites.heads(recipe.model)
    located = sites.at_positions(heads, {"tag": 0, "integer": 2})
    measure = dy.measures.correct_logit
    result = dy.patch_factors(recipe, None, [contrast_of("LN gelu")], located, measure)
    assert result["factor"].values.tolist() == ["x", "delta", "both"]
    assert result["site"].values.tolist() == [s.label for s in located]
    for coordinate in ("layer", "head", "component", "position"):
        assert result[coordinate].values.tolist() == [s.coords[coordinate] for s in located]


def test_the_references_are_those_of_patch_gradients():
    recipe = toy_recipe(optimizer=ADAMW, clip=CLIPS["by norm"])
    checkpoint, pair = begun(recipe).last, contrast_of("LN gelu")
    measure, patched = dy.measures.correct_logit, [whole(recipe)]
    one = dy.patch_factors(recipe, checkpoint, [pair], patched, measure)
    other = dy.patch_gradients(recipe, checkpoint, [pair], patched, measure)
    for name in ("base", "source", "untouched", "coasted"):
        assert one[name].item() == other[name].item()


def test_buffers_are_the_base_runs_by_factor_and_at_positions_as_patch_gradients_has_them():
    """With batch normalisation all parameters are not yet everything."""
    recipe, pair = RECIPES["convolutions"](), contrast_of("convolutions")
    checkpoint, everything = begun(recipe, "convolutions").last, sites.everything(recipe.model)
    found = factored(recipe, checkpoint, pair, [everything])
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(found["everything", "both"][name], found["base"][name])
        assert not torch.equal(found["source"][name], found["base"][name])


def test_where_both_batches_hold_the_same_tokens_and_other_targets_x_makes_no_difference():
    """Another signal meets the same content: δ is the whole effect, and nothing interacts."""
    recipe, batch = toy_recipe(), tokens(10)
    pair = dy.Contrast(batch, dataclasses.replace(batch, targets=(batch.targets + 1) % 11), tokens(12))
    patched = each(recipe)[::4]
    found = factored(recipe, None, pair, patched)
    for site in patched:
        assert same(found[site.label, "x"], found["base"])
        assert same(found[site.label, "delta"], found[site.label, "both"])
    assert not same(found["base"], found["source"])
    assert not all(same(found[site.label, "delta"], found["base"]) for site in patched)
