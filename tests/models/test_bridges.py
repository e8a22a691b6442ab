"""The verbs of activations on Hugging Face's GPT-2, as a module and as a bridge, beside its forward by hand."""

import copy
import math

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformer_lens import patching
from transformer_lens.tools.analysis.attribution_patching import attribution_patch
from transformer_lens.tools.analysis.interchange import SubspaceInterchange, run_with_intervention

import dynamics as dy
from checkpoints import Checkpoint, CheckpointPair
from dynamics import measures, sites
from dynamics.recipe import RecipeError
from dynamics.sites import Site
from tests.patching.test_activations import ALL, head_logit, pairs
from tests.test_batch_padding import padded, prompts
from tests.zoo.hugging_face import gpt2
from tests.zoo.small_models import D_VOCAB, perturbed, tokens

CHOSEN = {"a": 3, "b": 7}
BY = ("layer", "pos")


@pytest.fixture(scope="module")
def model():
    return gpt2().eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Words a, b, c, ... are the tokens; saved and loaded, as TransformerLens wants to load it again."""
    words = {word: i for i, word in enumerate(["<eos>", *"abcdefghij"][:D_VOCAB])}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, bos_token="<eos>", eos_token="<eos>", unk_token="<eos>"
    ).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bridge(model, tokenizer):
    return dy.bridge(model, tokenizer)


@pytest.fixture(scope="module")
def processed(model, tokenizer):
    return dy.processed_bridge(model, tokenizer)


# --- the forward by hand ----------------------------------------------------------------------------------


class ByHand:
    """GPT-2's forward from its weights; `kept` holds attention inputs and MLP outputs, some may be replaced."""

    def __init__(self, model, replaced=None):
        self.w = {name.removeprefix("transformer."): p.detach() for name, p in model.named_parameters()}
        self.n_layers, self.n_heads = model.config.n_layer, model.config.n_head
        self.replaced, self.kept = replaced or {}, {}

    def passed(self, name, value):
        if name in self.replaced:
            index, source = self.replaced[name]
            value = value.clone()
            value[index] = source[index]
        self.kept[name] = value
        return value

    def norm(self, name, x):
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.w[f"{name}.weight"]
            + self.w[f"{name}.bias"]
        )

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attention(self, name, x):
        n_rows, n_pos, d_model = x.shape
        q, k, v = (
            part.reshape(n_rows, n_pos, self.n_heads, -1).transpose(1, 2)
            for part in self.linear(f"{name}.c_attn", x).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(d_model // self.n_heads)
        scores[..., torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)] = -torch.inf
        z = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n_rows, n_pos, d_model)
        return self.linear(f"{name}.c_proj", z)

    def __call__(self, tokens):
        x = self.w["wte.weight"][tokens] + self.w["wpe.weight"][: tokens.shape[1]]
        for layer in range(self.n_layers):
            block = f"h.{layer}"
            normed = self.passed(f"a{layer}", self.norm(f"{block}.ln_1", x))
            x = x + self.attention(f"{block}.attn", normed)
            hidden = self.linear(f"{block}.mlp.c_fc", self.norm(f"{block}.ln_2", x))
            hidden = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
            x = x + self.passed(f"f{layer}", self.linear(f"{block}.mlp.c_proj", hidden))
        return self.norm("ln_f", x) @ self.w["wte.weight"].T


PLACES = {
    "module": {"f": "transformer.h.*.mlp", "a": "transformer.h.*.ln_1"},
    "bridge": {"f": "blocks.*.hook_mlp_out", "a": "blocks.*.ln1.hook_normalized"},
}
"""The two sites of each layer, by whose names."""


def test_the_forward_by_hand_is_gpt2s(model):
    assert (ByHand(model)(tokens(0).tokens) - model(tokens(0).tokens).logits).abs().max() < 1e-12


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("place", ["f", "a"])
def test_interchange_at_mlp_outputs_and_attention_inputs_is_the_forward_by_hand(model, bridge, kind, place):
    known = {"module": model, "bridge": bridge}[kind]
    chosen = sites.activations(known, PLACES[kind][place], by=BY, like=tokens(0))
    found = dy.interchange(dy.Recipe(known), None, pairs(), chosen, CHOSEN)
    assert found["patched"].dims == ("measure", "example", "site")
    assert found.sizes["site"] == 2 * 4
    assert set(found["units"].values) == {"probability"}
    assert abs(found["effect"]).max() > 1e-3
    for i, contrast in enumerate(pairs()):
        source = ByHand(model)
        source(contrast.source.tokens)
        for site in chosen:
            name = f"{place}{site.coords['layer']}"
            index = (ALL, site.coords["pos"])
            logits = ByHand(model, {name: (index, source.kept[name])})(contrast.base.tokens)
            distribution = measures.at_target_pos(logits, contrast.base).softmax(-1).mean(0)
            for token, number in CHOSEN.items():
                cell = found["patched"].sel(measure=token, site=site.label).isel(example=i).item()
                assert cell == pytest.approx(float(distribution[number]), abs=1e-6)  # its softmax is in fp32


def test_the_tidy_frame_has_a_row_for_each_token_example_and_site(bridge):
    chosen = [
        site
        for pattern in PLACES["bridge"].values()
        for site in sites.activations(bridge, pattern, by=BY, like=tokens(0))
    ]
    found = dy.interchange(dy.Recipe(bridge), None, pairs(), chosen, CHOSEN)
    frame = dy.results.tidy(found)
    assert len(frame) == 2 * 3 * 16
    assert {"measure", "example", "site", "component", "layer", "pos", "patched", "base"} <= set(frame)
    picked = frame[
        (frame["measure"] == "b") & (frame["example"] == "pair 1") & (frame["site"] == "mlp_out 1 @2")
    ]
    assert picked["patched"].item() == found["patched"].sel(
        measure="b", example="pair 1", site="mlp_out 1 @2"
    )
    assert set(frame["component"]) == {"mlp_out", "ln1.normalized"}


def test_it_is_transformer_lenss_interchange_of_a_whole_activation(bridge):
    contrast = pairs(1, rows=3)[0]
    chosen = sites.activations(bridge, "blocks.*.hook_mlp_out", by=BY, like=tokens(0))
    found = dy.interchange(dy.Recipe(bridge), None, [contrast], chosen, CHOSEN)
    whole = SubspaceInterchange(torch.eye(16, dtype=torch.float64))
    for site in chosen:
        ((hook, _),), pos = site.covers.items(), site.coords["pos"]
        with torch.no_grad():
            _, cache = bridge.run_with_cache(contrast.source.tokens)
            logits = run_with_intervention(
                bridge,
                hook,
                whole,
                contrast.base.tokens,
                cache[hook][:, pos],
                lambda batch: measures.at_target_pos(bridge(batch), contrast.base),
                positions=torch.full((3,), pos),
            )
        expected = logits.softmax(-1).mean(0)
        for token, number in CHOSEN.items():
            cell = found["patched"].sel(measure=token, site=site.label).item()
            assert cell == pytest.approx(float(expected[number]), abs=1e-9)


# --- bridges ----------------------------------------------------------------------------------------------

FAMILIES = {
    "resid_pre": ("blocks.*.hook_resid_pre", BY),
    "attn_out": ("blocks.*.hook_attn_out", BY),
    "attn_head_out_by_pos": ("blocks.*.attn.hook_z", ("layer", "pos", "head")),
    "attn_head_q_by_pos": ("blocks.*.attn.hook_q", ("layer", "pos", "head")),
    "attn_head_v_all_pos": ("blocks.*.attn.hook_v", ("layer", "head")),
    "attn_head_pattern_by_pos": ("blocks.*.attn.hook_pattern", ("layer", "head", "pos")),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bridge", "processed"])
@pytest.mark.parametrize("measure", [measures.correct_logit, head_logit])
def test_on_a_bridge_it_is_what_transformer_lens_finds(request, kind, family, measure):
    known, (pattern, by) = request.getfixturevalue(kind), FAMILIES[family]
    contrast = pairs(1, rows=3)[0]
    found = dy.patch_activations(
        dy.Recipe(known), None, [contrast], sites.activations(known, pattern, by, tokens(0)), measure
    )

    def metric(logits):
        return measure(lambda _: logits, contrast.base).mean()

    with torch.no_grad():
        _, cache = known.run_with_cache(contrast.source.tokens)
        expected = getattr(patching, f"get_act_patch_{family}")(known, contrast.base.tokens, cache, metric)
    order = np.lexsort([found[axis].values for axis in reversed(by)])
    assert np.ptp(expected.numpy()) > 1e-4
    np.testing.assert_allclose(
        found["patched"].values[0][order].reshape(expected.shape), expected, rtol=0, atol=1e-5
    )


def test_a_bridge_is_the_module_and_a_processed_one_has_its_probabilities_in_a_centred_basis(
    model, bridge, processed
):
    batch = tokens(0)
    with torch.no_grad():
        logits = model(batch.tokens).logits
        assert (bridge(batch.tokens) - logits).abs().max() < 1e-12
        centred = processed(batch.tokens)
        assert (centred.log_softmax(-1) - logits.log_softmax(-1)).abs().max() < 1e-5
        assert centred.mean(-1).abs().max() < 1e-5 < logits.mean(-1).abs().max()
        _, cache = processed.run_with_cache(batch.tokens)
    assert cache["blocks.1.hook_resid_pre"].mean(-1).abs().max() < 1e-6
    assert (bridge.training, processed.training) == (False, False)


def test_a_bridge_is_made_of_a_copy(model, tokenizer):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    dy.processed_bridge(model, tokenizer)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("kind", ["bridge", "processed"])
@pytest.mark.parametrize("verb", [dy.patch_activations, dy.attribute_activations])
def test_a_bridge_stays_as_it_was(request, kind, verb):
    known = request.getfixturevalue(kind)
    before = {name: p.detach().clone() for name, p in known.named_parameters()}
    seen = []
    known.add_hook("blocks.0.hook_mlp_out", lambda value, hook: seen.append(1))
    hooks = {name: len(point.fwd_hooks) for name, point in known.hook_dict.items()}
    chosen = sites.activations(known, "blocks.*.attn.hook_z", ("layer", "head"), tokens(0))
    verb(dy.Recipe(known), None, pairs(), chosen, {"lens": measures.correct_logit, "plain": head_logit})
    assert seen
    assert {name: len(point.fwd_hooks) for name, point in known.hook_dict.items()} == hooks
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in known.named_parameters())
    known.reset_hooks()


@pytest.mark.parametrize("kind", ["bridge", "processed"])
def test_attribution_on_a_bridge_is_transformer_lenss(request, kind):
    known = request.getfixturevalue(kind)
    contrasts = pairs(3, rows=1)
    chosen = [
        site
        for pattern, by in {
            "hook_embed": ("pos",),
            "blocks.*.attn.hook_z": ("layer", "pos", "head"),
            "blocks.*.hook_mlp_out": BY,
        }.items()
        for site in sites.activations(known, pattern, by, tokens(0))
    ]

    def last(model, batch):
        return model(batch.tokens)[:, 3, 5]

    found = dy.attribute_activations(dy.Recipe(known), None, contrasts, chosen, last)["attribution"].mean(
        "example"
    )
    clean, corrupt = (torch.cat([getattr(c, side).tokens for c in contrasts]) for side in ("source", "base"))
    nodes = attribution_patch(known, clean, corrupt, lambda logits: logits[0, 3, 5]).node_scores
    assert len(nodes) == found.sizes["site"]
    assert max(map(abs, nodes.values())) > 1e-2
    for node, score in nodes.items():
        covered = {"embed": "hook_embed"}.get(node.kind, node.hook_name)
        wanted = {covered: (ALL, node.position) if node.head is None else (ALL, node.position, node.head)}
        (label,) = [site.label for site in chosen if site.covers == wanted]
        assert found.sel(site=label).item() == pytest.approx(score, abs=1e-5)


@pytest.mark.slow
def test_integrated_attributions_on_a_bridge_sum_to_the_exchange_of_the_hook(bridge):
    for pattern in ("blocks.*.attn.hook_q", "blocks.*.attn.hook_pattern"):
        cut = sites.activations(bridge, pattern, ("layer", "head", "pos"), tokens(0))
        whole = sites.activations(bridge, pattern, ("layer",))
        found = dy.attribute_activations(
            dy.Recipe(bridge), None, pairs(), cut, measures.correct_logit, "integrated", 1e-6
        )
        effect = dy.patch_activations(dy.Recipe(bridge), None, pairs(), whole, measures.correct_logit)[
            "effect"
        ]
        missed = found["attribution"].groupby("layer").sum() - effect.values
        assert abs(missed).max() < 1e-5
        assert abs(effect).max() > 1e-3


@pytest.fixture(scope="module")
def later(model):
    """The same model, some training later."""
    return perturbed(copy.deepcopy(model), seed=7, scale=0.2)


@pytest.mark.parametrize("place", ["f", "a"])
def test_a_bridge_receives_what_the_bridge_of_another_checkpoint_computes(
    model, later, tokenizer, bridge, place
):
    pair = CheckpointPair(Checkpoint.capture(bridge), Checkpoint.capture(dy.bridge(later, tokenizer), step=9))
    (contrast,) = pairs(1)
    glob = {"f": "blocks.*.hook_mlp_out", "a": "blocks.*.ln1.hook_out"}[place]
    chosen = sites.activations(bridge, glob, by=BY, like=contrast.base)
    found = dy.interchange(dy.Recipe(bridge), pair, [contrast], chosen, CHOSEN)
    source = ByHand(later)
    source(contrast.source.tokens)
    for site in chosen:
        name = f"{place}{site.coords['layer']}"
        logits = ByHand(model, {name: ((ALL, site.coords["pos"]), source.kept[name])})(contrast.base.tokens)
        distribution = measures.at_target_pos(logits, contrast.base).softmax(-1).mean(0)
        for token, number in CHOSEN.items():
            cell = found["patched"].sel(measure=token, site=site.label).item()
            assert cell == pytest.approx(float(distribution[number]), abs=1e-6)  # its softmax is in fp32
    assert abs(found["effect"]).max() > 1e-3
    assert Checkpoint.capture(bridge).equals(pair.base)


def test_a_pair_of_one_bridge_changes_nothing_and_one_of_the_module_is_refused(model, bridge):
    state = Checkpoint.capture(bridge)
    contrasts = [dy.Contrast(tokens(1))]
    chosen = sites.activations(bridge, "blocks.*.attn.hook_z", ("layer", "head"), contrasts[0].base)
    found = dy.patch_activations(
        dy.Recipe(bridge), CheckpointPair(state, state), contrasts, chosen, measures.correct_logit
    )
    assert (found["effect"] == 0).all()
    of_module = CheckpointPair(Checkpoint.capture(model), Checkpoint.capture(model))
    with pytest.raises(RecipeError, match=r"Capture it of a bridge .* Checkpoint\.capture\(dy\.bridge"):
        dy.patch_activations(dy.Recipe(bridge), of_module, contrasts, chosen, measures.correct_logit)


def test_a_checkpoint_for_a_bridge_is_refused(model, bridge):
    chosen = [Site("mlp", {"blocks.0.hook_mlp_out": ...})]
    for verb in (dy.patch_activations, dy.attribute_activations):
        with pytest.raises(RecipeError, match="a TransformerBridge is measured as it stands"):
            verb(dy.Recipe(bridge), Checkpoint.capture(model), pairs(), chosen, measures.correct_logit)


def test_verbs_of_steps_refuse_a_bridge_instead_of_ruining_it(bridge):
    recipe = dy.Recipe(bridge, lambda m, b: m(b.tokens).mean(), torch.optim.AdamW)
    chosen = sites.parameters(bridge)[:1]
    with pytest.raises(TypeError, match="Give the verbs that take a step the Hugging Face model itself"):
        dy.patch_gradients(recipe, None, pairs(), chosen, measures.correct_logit)


@pytest.mark.filterwarnings("ignore:add_hook. skipped")  # TransformerLens says which points never fire
@pytest.mark.parametrize("kind", ["bridge", "processed"])
def test_the_cache_of_a_bridge_is_that_of_hooks_forward_and_backward(request, kind):
    """get_cache_fwd_and_bwd of the attribution patching demo."""
    known, batch = request.getfixturevalue(kind), tokens(0)
    forward, backward = {}, {}

    def metric(logits):
        return measures.at_target_pos(logits, batch)[:, 3].mean()

    def cached(name):
        return "_input" not in name and "hook" in name

    known.reset_hooks()
    known.add_hook(cached, lambda value, hook: forward.update({hook.name: value.detach()}), "fwd")
    known.add_hook(cached, lambda signal, hook: backward.update({hook.name: signal.detach()}), "bwd")
    metric(known(batch.tokens)).backward()
    known.reset_hooks()
    known.zero_grad()
    kept = dy.cache(dy.Recipe(known, lambda model, b: metric(model(b.tokens))), None, batch)
    compared = [name for name in forward if forward[name].is_floating_point()]
    assert len(compared) > 40
    for name in compared:
        assert torch.equal(kept.activations[name], forward[name]), name
    both = [name for name in compared if name in backward and "scale" not in name and name in kept.signals]
    assert {"blocks.0.attn.hook_pattern", "blocks.1.hook_out", "blocks.0.mlp.out.hook_out"} <= set(both)
    for name in both:
        assert (kept.signals[name] - backward[name]).abs().max() < 1e-9, name
    assert all(p.grad is None for p in known.parameters())
    with pytest.raises(RecipeError, match="measured as it stands"):
        dy.cache(dy.Recipe(known), Checkpoint.capture(torch.nn.Linear(1, 1)), batch)


def test_hooks_of_a_bridge_are_transformer_lenss(bridge):
    assert sites.hooks(bridge, "blocks.*.hook_resid_pre") == [
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_resid_pre",
    ]
    assert set(sites.hooks(bridge)) == set(bridge.hook_dict)


def test_a_hook_that_does_not_fire_is_refused(bridge):
    with pytest.raises(sites.SiteError, match="gave no floating-point tensor"):
        dy.patch_activations(
            dy.Recipe(bridge),
            None,
            pairs(),
            [Site("x", {"blocks.0.attn.hook_result": ...})],
            measures.correct_logit,
        )


# --- padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_bridge_gives_for_padded_prompts_what_the_model_gives(model, bridge, side):
    together = padded(prompts(0), side)
    for measure in (measures.correct_log_prob, measures.logit_difference):
        torch.testing.assert_close(
            measure(bridge, together).detach(), measure(model, together).detach(), rtol=1e-5, atol=1e-6
        )
