"""Sites of a PeftModel: its adapters, and the model's own parts seen through it."""

import copy

import pytest
import torch

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.sites import SiteError
from tests.zoo.cases import first_quick
from tests.zoo.hugging_face import gpt2, hf_loss, llama, times_covered
from tests.zoo.small_models import tokens

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for it

MODELS = {
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama": (llama, {"target_modules": ["q_proj", "v_proj"]}),
}


def adapted(name):
    build, settings = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(
            build(), peft.LoraConfig(r=2, init_lora_weights=False, **settings)
        ).double()


@pytest.mark.parametrize("level", first_quick(["heads", "circuits", "layers"]))
@pytest.mark.parametrize("name", MODELS)
def test_the_models_own_parts_are_seen_through_its_adapters(name, level):
    plain, model = MODELS[name][0](), adapted(name)
    expected, found = getattr(sites, level)(plain), getattr(sites, level)(model)
    own = dict(plain.named_parameters())
    held = dict(model.named_parameters())
    assert [(s.label, s.coords) for s in found] == [(s.label, s.coords) for s in expected]
    for one, other in zip(expected, found, strict=True):
        frozen = {n: i for n, i in other.covers.items() if "lora_" not in n}
        assert len(frozen) == len(one.covers)
        for mine, theirs in zip(one.covers.items(), frozen.items(), strict=True):
            assert torch.equal(own[mine[0]][mine[1]], held[theirs[0]][theirs[1]])


@pytest.mark.parametrize("level", ["components", "matrices", "parameters"])
@pytest.mark.parametrize("name", MODELS)
def test_the_levels_are_partitions_of_an_adapted_model(name, level):
    model = adapted(name)
    parts = getattr(sites, level)(model)
    sites.check(parts, model)
    assert all((count == 1).all() for count in times_covered(model, parts).values())


def test_adapters_are_found_by_block_and_projection():
    model = adapted("llama")
    labels = [f"self_attn.{p} {layer}" for layer in (0, 1) for p in ("q_proj", "v_proj")]
    assert [s.label for s in sites.adapters(model)] == labels
    assert [s.label for s in sites.adapters(model, ("layer",))] == ["adapters 0", "adapters 1"]
    assert [s.label for s in sites.adapters(model, ("projection",))] == [
        "self_attn.q_proj",
        "self_attn.v_proj",
    ]
    (everything,) = sites.adapters(model, ())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for by in (("layer", "projection"), ("layer",), ("projection",), ()):
        covered = [name for site in sites.adapters(model, by) for name in site.covers]
        assert sorted(covered) == sorted(trained) == sorted(everything.covers)
    with pytest.raises(SiteError, match="LlamaForCausalLM has no adapters"):
        sites.adapters(llama())
    with pytest.raises(SiteError, match="'head' is neither"):
        sites.adapters(model, ("head",))


def test_a_step_of_the_adapters_replays_and_is_patched_by_projection():
    model = adapted("gpt2")
    recipe = dy.Recipe(
        model,
        hf_loss,
        lambda ps: torch.optim.AdamW([p for p in ps if p.requires_grad], lr=0.01),
        max_grad_norm=0.1,
    )
    live = copy.deepcopy(model)
    optimizer = recipe.optimizer(live.parameters())
    state = Checkpoint.capture(live, optimizer)
    hf_loss(live, tokens(0)).backward()
    torch.nn.utils.clip_grad_norm_(live.parameters(), 0.1)
    optimizer.step()
    after = Checkpoint.capture(live, optimizer, step=1)
    assert dy.steps.replay(recipe, state, tokens(0)).differences(after) == []
    contrast = dy.Contrast(tokens(0), tokens(1), tokens(2))
    whole = [*sites.adapters(model, ()), *sites.adapters(model)]
    found = dy.patch_gradients(recipe, state, [contrast], whole, dy.measures.correct_logit)
    torch.testing.assert_close(
        float(found["patched"].isel(site=0).item()), float(found["source"].item()), rtol=1e-9, atol=1e-12
    )
