"""Sites of Hugging Face's transformers: the levels are partitions, ties are said, other models are refused."""

from types import SimpleNamespace

import pytest
from torch import Tensor, nn

from dynamics import sites
from dynamics.sites import Site, SiteError
from tests.zoo.hugging_face import BUILDERS, WITH_HEAD, found, gpt2, llama, model_of, times_covered
from tests.zoo.small_models import classifier, tied

every_model = pytest.mark.parametrize("name", BUILDERS)


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


@pytest.mark.parametrize("name", WITH_HEAD)
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


def test_fused_matrices_stored_the_other_way_round_are_not_taken_for_gpt2s():
    model = gpt2()
    for block in model.transformer.h:
        block.attn.c_attn = nn.Linear(16, 48)
    text = r"c_attn\.weight of shape \[d_model, \(3 n_heads d_head\)\] \(it is \[48, 16\]"
    for level in (sites.heads, sites.circuits, sites.matrices):
        with pytest.raises(SiteError, match=text):
            level(model)
    assert len(sites.layers(model)) == 2


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
    assert [s.label for s in sites.heads(model)] == expected
    assert len(expected) == 8
