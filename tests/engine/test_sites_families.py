"""Sites of Hugging Face's transformers: the slices are the heads, the levels are partitions, ties are said."""

import copy
import sys
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from engine_models import ADAMW, classifier, draws, perturbed, tied, tokens, trained
from engine_oracle import backward, seed_patch
from hugging_face import GROUPED, QUIET, built, gpt2, hf_loss, llama, neox
from torch import Tensor, nn

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site, SiteError


def other(name, **changes):
    """A model of another class whose names are a known family's."""
    config = getattr(transformers, f"{name}Config")(**{**QUIET, **GROUPED, **changes})
    return built(getattr(transformers, f"{name}ForCausalLM"), config)


WITH_HEAD = {
    "gpt2": gpt2,
    "gpt2 of four heads": partial(gpt2, n_head=4),
    "gpt2 untied": partial(gpt2, tie_word_embeddings=False),
    "neox": neox,
    "neox of four heads": partial(neox, num_attention_heads=4),
    "neox without biases": partial(neox, attention_bias=False),
    "llama": llama,
    "llama with one key head": partial(llama, num_key_value_heads=1),
    "llama with a key head for each query": partial(llama, num_key_value_heads=4),
    "llama with heads of another size": partial(llama, head_dim=6),
    "llama with biases": partial(llama, attention_bias=True, mlp_bias=True),
    "llama tied": partial(llama, tie_word_embeddings=True),
    "mistral": partial(other, "Mistral"),
    "qwen2": partial(other, "Qwen2"),
    "qwen3": partial(other, "Qwen3", head_dim=4),
}
WITHOUT_HEAD = {
    "gpt2 without its head": lambda: gpt2().transformer,
    "neox without its head": lambda: neox().gpt_neox,
    "llama without its head": lambda: llama().model,
}
BUILDERS = {**WITH_HEAD, **WITHOUT_HEAD}


@cache
def model_of(name):
    """Built once; a test that changes a model builds its own."""
    return BUILDERS[name]()


every_model = pytest.mark.parametrize("name", BUILDERS)
every_model_with_a_head = pytest.mark.parametrize("name", WITH_HEAD)


def times_covered(model, parts):
    """How often each element of each parameter is covered, counted by boolean masks."""
    counts = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in model.named_parameters()}
    for site in parts:
        for name, index in site.covers.items():
            mask = torch.zeros(counts[name].shape, dtype=torch.bool)
            mask[index] = True
            counts[name] += mask
    return counts


def found(parts, **coords):
    return [s for s in parts if all(s.coords[name] == value for name, value in coords.items())]


# --- partitions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["matrices", "components", "parameters"])
@every_model
def test_matrices_components_and_parameters_cover_every_element_exactly_once(name, level):
    model = model_of(name)
    parts = getattr(sites, level)(model)
    sites.check(parts, model)
    assert all((count == 1).all() for count in times_covered(model, parts).values())


@every_model
def test_no_level_covers_by_masks_and_contiguous_places_are_slices(name):
    model = model_of(name)
    for level in sites.LEVELS.values():
        for site in level(model):
            assert not any(isinstance(index, Tensor) for index in site.covers.values())
            for part in (p for index in site.covers.values() if isinstance(index, tuple) for p in index):
                assert isinstance(part, slice) or part.diff().max() > 1


@every_model
def test_layers_cover_the_blocks_exactly_once_and_up_to_layer_grows_to_everything(name):
    model = model_of(name)
    in_a_block = {s.label: s.coords["layer"] >= 0 for s in sites.parameters(model)}
    assert sum(in_a_block.values()) > 10
    for count, inside in zip(
        times_covered(model, sites.layers(model)).values(), in_a_block.values(), strict=True
    ):
        assert (count == inside).all()
    first, *_, last = sites.up_to_layer(model)
    assert all((count == 1).all() for count in times_covered(model, [last]).values())
    embeddings = found(sites.components(model), component="embed") + found(
        sites.components(model), component="pos_embed"
    )
    assert set(first.covers) == {name for site in embeddings for name in site.covers}


def test_a_parameter_that_the_family_does_not_name_is_a_site_of_its_own():
    model = model_of("qwen3")
    norm = "model.layers.1.self_attn.q_norm.weight"
    (site,) = (s for s in sites.matrices(model) if norm in s.covers)
    assert (site.label, site.coords["layer"], site.coords["head"]) == (norm, 1, -1)
    assert [s.label for s in sites.components(model) if norm in s.covers] == ["attn 1"]


@every_model_with_a_head
def test_families_and_the_toy_share_one_vocabulary(name):
    model = model_of(name)
    labels = [s.label.split(" (tied")[0] for s in sites.components(model)]
    untied = [] if "unembed" in sites.components(model)[0].label else ["unembed"]
    positions = ["pos_embed"] if "gpt2" in name else []
    blocks = [f"{part} {layer}" for layer in range(2) for part in ("attn", "mlp", "ln")]
    assert labels == ["embed", *positions, *blocks, "ln_final", *untied]
    assert {"W_E", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "ln1.w,b", "ln2.w,b", "ln_final.w,b"} <= {
        s.coords["component"] for s in sites.matrices(model)
    }


# --- the heads, by what the model does with them ----------------------------------------------------------

OUTPUTS = ("attn.c_proj", "attention.dense", "self_attn.o_proj")
"""The modules that read the heads' results side by side, [..., n_heads · d_head]."""


def outputs(model):
    return [module for name, module in model.named_modules() if name.endswith(OUTPUTS)]


def watched(model, batch):
    """Per layer Q, K, V as the model's own attention gets them, and the z it hands on: [batch, head, pos, size]."""
    code = sys.modules[type(model).__module__]
    attention, seen = code.eager_attention_forward, []

    def recorded(module, query, key, value, *rest, **named):
        seen.append({"Q": query, "K": key, "V": value})
        return attention(module, query, key, value, *rest, **named)

    def keep(_, inputs, output):
        z = inputs[0].unflatten(-1, (seen[-1]["Q"].shape[1], -1)).transpose(1, 2)
        seen[-1].update(z=z, output=output[:, None])

    handles = [module.register_forward_hook(keep) for module in outputs(model)]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(code, "eager_attention_forward", recorded)
        model(batch.tokens)
    for handle in handles:
        handle.remove()
    return seen


def nudged(model, covers):
    """A copy with everything covered changed."""
    twin = copy.deepcopy(model)
    generator = draws(3)
    with torch.no_grad():
        for name, index in covers.items():
            parameter = twin.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter[index] += noise[index]
    return twin


def changed(before, after):
    """The heads that differ, by layer and quantity."""
    return [
        {
            what: {h for h in range(t.shape[1]) if not torch.equal(t[:, h], new[what][:, h])}
            for what, t in old.items()
        }
        for old, new in zip(before, after, strict=True)
    ]


def group(model, head):
    """The query heads that share keys and values with one."""
    n = model.config.num_attention_heads // getattr(
        model.config, "num_key_value_heads", model.config.num_attention_heads
    )
    return set(range(head // n * n, head // n * n + n))


@every_model_with_a_head
def test_a_heads_matrix_moves_what_the_model_makes_of_it_and_nothing_else(name):
    model, batch = model_of(name), tokens(0)
    before = watched(model, batch)
    parts = [s for s in sites.matrices(model) if s.coords["head"] >= 0]
    n_heads, n_shared = model.config.num_attention_heads, len(found(parts, component="W_K", layer=0))
    assert len(parts) == 2 * (2 * n_heads + 2 * n_shared)
    for site in parts:
        part, layer, head = site.coords["component"][-1], site.coords["layer"], site.coords["head"]
        after = changed(before, watched(nudged(model, site.covers), batch))
        assert not any(heads for below in after[:layer] for heads in below.values())
        here = after[layer]
        assert here["output"] == {0}
        assert {p: here[p] for p in "QKV"} == {p: {head} if p == part else set() for p in "QKV"}
        used_by = {"Q": {head}, "O": set()}.get(part, group(model, head * n_heads // n_shared))
        assert here["z"] == used_by, site.label


@every_model_with_a_head
def test_a_heads_output_matrix_reads_its_own_columns_alone(name):
    model = model_of(name)
    generator, n_heads = draws(1), model.config.num_attention_heads
    for site in found(sites.matrices(model), component="W_O"):
        twin = nudged(model, site.covers)
        old, new = (outputs(m)[site.coords["layer"]] for m in (model, twin))
        (weight,) = site.covers
        width = model.get_parameter(weight).numel() // model.config.hidden_size
        z = torch.randn(5, n_heads, width // n_heads, generator=generator, dtype=torch.float64)
        silent = z.clone()
        silent[:, site.coords["head"]] = 0.0
        assert torch.equal(old(silent.flatten(1)), new(silent.flatten(1)))
        assert (old(z.flatten(1)) != new(z.flatten(1))).all()


@every_model_with_a_head
def test_a_head_moves_its_own_result_and_with_shared_keys_and_values_its_groups(name):
    model, batch = model_of(name), tokens(0)
    before = watched(model, batch)
    output = {f"{n}.weight" for n, _ in model.named_modules() if n.endswith(OUTPUTS)}
    for site in sites.heads(model):
        inputs = {n: index for n, index in site.covers.items() if n not in output}
        here = changed(before, watched(nudged(model, inputs), batch))[site.coords["layer"]]
        assert here["z"] == group(model, site.coords["head"])
        assert here["Q"] == {site.coords["head"]}
        only_output = {n: index for n, index in site.covers.items() if n in output}
        here = changed(before, watched(nudged(model, only_output), batch))[site.coords["layer"]]
        assert (here["z"], here["output"]) == (set(), {0})


@every_model
def test_heads_and_circuits_are_made_of_the_matrices_of_their_head(name):
    model = model_of(name)
    single = sites.matrices(model)
    n_heads, n_shared = (len(found(single, component=c, layer=0)) for c in ("W_Q", "W_K"))
    for site in [*sites.heads(model), *sites.circuits(model)]:
        layer, head = site.coords["layer"], site.coords["head"]
        shared = head * n_shared // n_heads
        own = {"Q": head, "K": shared, "V": shared, "O": head}
        letters = {"head": "QKVO", "QK": "QK", "OV": "OV"}[site.coords["component"]]
        parts = [found(single, component=f"W_{p}", layer=layer, head=own[p])[0] for p in letters]
        expected, count = times_covered(model, parts), times_covered(model, [site])
        assert all(torch.equal(expected[n], count[n]) for n in count)
        assert max(int(c.max()) for c in expected.values()) == 1


# --- the verbs --------------------------------------------------------------------------------------------

SINGLE_INSIDE = 1e-6
"""Where a model computes softmax, norms and rotations in single precision, whatever its dtype: a difference of
one ulp of a double before them may become one of a float behind."""

TOLERANCES = {"gpt2": 1e-10, "neox": SINGLE_INSIDE, "llama": SINGLE_INSIDE, "qwen2": SINGLE_INSIDE}


@pytest.mark.parametrize("level", ["heads", "components"])
@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])
@pytest.mark.parametrize("name", TOLERANCES)
def test_patching_equals_the_seeds_algorithm(name, verb, level):
    """Unclipped and with an optimizer that works element by element, an exchanged update is the update of an
    exchanged gradient."""
    recipe = dy.Recipe(
        model_of(name), hf_loss, ADAMW, max_grad_norm=0.1 if verb is dy.patch_gradients else None
    )
    live = trained(recipe, [tokens(0), tokens(1)])
    pair = dy.Contrast(tokens(10), tokens(11), tokens(12))
    patched = sites.LEVELS[level](recipe.model)
    measures = {"correct_logit": dy.measures.correct_logit}
    result = verb(recipe, live.last, [pair], patched, measures)
    gradients = tuple(backward(recipe, live.model, batch) for batch in (pair.base, pair.source))
    for site in patched:
        expected = seed_patch(recipe, live, pair, site, measures, gradients=gradients)["correct_logit"]
        cell = result.sel(site=site.label).isel(example=0, measure=0)
        assert abs(cell["patched"].item() - expected) < TOLERANCES[name] * max(1.0, abs(expected))
        assert abs(cell["effect"].item()) > 1e-5


# --- ties -------------------------------------------------------------------------------------------------


def test_a_tied_tensor_is_one_site_whose_label_says_what_else_it_is():
    model = gpt2()
    embedding, output = "transformer.wte.weight", "lm_head.weight"
    labels = {
        level: [s.label for s in make(model) if embedding in s.covers] for level, make in sites.LEVELS.items()
    }
    assert labels["components"] == ["embed (tied: unembed)"]
    assert labels["matrices"] == ["W_E (tied: W_U)"]
    assert labels["up_to_layer"][0] == "embeddings (tied: unembed)"
    assert next(s.label for s in sites.parameters(model)) == f"{embedding} (tied: {output})"
    for level in (*sites.LEVELS.values(), sites.parameters):
        assert not any(output in s.covers for s in level(model))
        assert not any("tied" in s.label for s in level(gpt2(tie_word_embeddings=False)))
    assert next(s.label for s in sites.parameters(tied())) == "embed.weight (tied: unembed.weight)"


def test_a_tied_tensor_keeps_its_coordinates():
    one, other = (
        found(sites.components(gpt2(tie_word_embeddings=t)), component="embed") for t in (True, False)
    )
    assert one[0].coords == other[0].coords


def test_a_tied_tensor_is_matched_and_excluded_by_any_of_its_names():
    model = gpt2()
    by_either = sites.matching(model, {"head": "lm_head.*", "embedding": "transformer.wte.*"})
    assert [(s.label, s.covers) for s in by_either] == [
        (label, {"transformer.wte.weight": ...}) for label in ("head", "embedding")
    ]
    for excluded in ("lm_head.*", "*wte*"):
        (rest,) = sites.matching(model, {"all": "*"}, exclude=excluded)
        assert set(rest.covers) == {n for n, _ in model.named_parameters()} - {"transformer.wte.weight"}


def test_a_site_under_the_second_name_of_a_tied_tensor_is_told_the_first():
    with pytest.raises(SiteError, match=r"covers 'lm_head\.weight'.*transformer\.wte\.weight"):
        sites.check([Site("head", {"lm_head.weight": ...})], gpt2())


def test_matrices_tied_across_blocks_are_said_by_their_names():
    model = llama()
    shared = model.model.layers[0].mlp.up_proj
    model.model.layers[1].mlp.up_proj = shared
    assert [s.label for s in sites.matrices(model) if "W_in" in s.label] == [
        "W_in 0 (tied: model.layers.1.mlp.up_proj.weight)"
    ]


# --- coordinates and errors -------------------------------------------------------------------------------


@every_model
def test_whole_parameters_know_their_layer(name):
    model = model_of(name)
    for site in sites.parameters(model):
        (covered,) = site.covers
        numbers = [int(word) for word in covered.split(".") if word.isdigit()]
        assert [site.coords["layer"]] == (numbers or [-1])
    (block,) = sites.matching(model, {"mlp": "*.1.mlp.*" if name in WITH_HEAD else "*1.mlp.*"})
    assert block.coords["layer"] == 1


@pytest.mark.parametrize("level", sites.LEVELS)
def test_a_model_of_no_known_family_is_told_the_families_and_what_to_use(level):
    with pytest.raises(SiteError) as error:
        sites.LEVELS[level](classifier())
    for said in (
        "Classifier has no parameters named blocks.0... as TransformerLens",
        "transformer.h.0.attn.c_attn... as GPT-2",
        "gpt_neox.layers.0.attention.query_key_value... as GPT-NeoX",
        "model.layers.0.self_attn.o_proj... as Llama",
        "sites.parameters(model) or sites.matching(model, {label: glob})",
    ):
        assert said in str(error.value)


def named(**modules):
    """A module with the names given, dots and all."""
    root = nn.Module()
    for path, module in modules.items():
        *parents, last = path.split("__")
        home = root
        for parent in parents:
            if not hasattr(home, parent):
                home.add_module(parent, nn.Module())
            home = getattr(home, parent)
        home.add_module(last, module)
    return root


def fused(rows, columns):
    attention = {
        "transformer__h__0__attn__c_attn": nn.Linear(columns, rows),
        "transformer__h__0__attn__c_proj": nn.Linear(12, 12),
    }
    return named(**attention)


def test_fused_matrices_stored_the_other_way_round_are_not_taken_for_gpt2s():
    model = fused(36, 12)
    model.config = SimpleNamespace(n_head=2, n_embd=12)
    text = r"Module has no transformer\.h\.0\.attn\.c_attn.* of shape \[.*\(3 n_heads d_head\)\] \(it is \[36"
    for level in (sites.heads, sites.circuits, sites.matrices):
        with pytest.raises(SiteError, match=text):
            level(model)
    assert len(sites.layers(model)) == 1


def test_a_model_that_does_not_say_how_many_heads_it_has_is_told_so():
    model = gpt2()
    model.config = None
    with pytest.raises(SiteError, match=r"does not say how many heads .*c_attn\.weight.*num_attention_heads"):
        sites.heads(model)
    assert [s.label for s in sites.layers(model)] == ["block 0", "block 1"]


def test_more_heads_than_the_shapes_hold_are_refused():
    model = llama()
    model.config = SimpleNamespace(num_attention_heads=3, num_key_value_heads=2)
    with pytest.raises(
        SiteError, match=r"q_proj\.weight of shape \[\(n_heads d_head\), d_model\] \(it is \[16, 16\]"
    ):
        sites.heads(model)


def test_a_missing_projection_is_named():
    model = llama()
    del model.model.layers[1].self_attn.v_proj
    with pytest.raises(SiteError, match=r"no model\.layers\.1\.self_attn\.v_proj\.weight .*there is none"):
        sites.heads(model)


def test_head_counts_under_gpt2s_own_names_will_do():
    model = gpt2(n_head=4)
    expected = [s.label for s in sites.heads(model)]
    model.config = SimpleNamespace(n_head=4)
    assert [s.label for s in sites.heads(perturbed(model))] == expected
    assert len(expected) == 8
