"""patch_activations beside TransformerLens's own sweeps, hooks written by hand, and identities."""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformer_lens import patching

import dynamics as dy
from dynamics import measures, sites
from dynamics.batch import Batch, concatenate
from dynamics.engine import forward_passes
from dynamics.recipe import RecipeError
from dynamics.sites import Site, SiteError
from tests.oracles.forward_hooks import outputs_of, patched_by_hand
from tests.zoo.signal_models import COARSE, RECIPES, TOYS, Mlp, batch_of, made
from tests.zoo.small_models import ADAMW, D_VOCAB, margin, spread, tokens, trained, transformer

ALL = slice(None)
LOGITS = {"correct": measures.correct_logit, "nats": measures.correct_log_prob}


def like(batch: Batch, seed: int) -> Batch:
    """Other tokens with the same targets at the same positions: a clean prompt for a corrupted one."""
    return dataclasses.replace(batch, tokens=tokens(seed, len(batch)).tokens)


def pairs(n: int = 3, rows: int = 2) -> list[dy.Contrast]:
    base = [tokens(10 + i, rows) for i in range(n)]
    return [dy.Contrast(b, like(b, 20 + i), coords={"example": f"pair {i}"}) for i, b in enumerate(base)]


def everywhere(model, pattern, *by, batch=None):
    return sites.activations(model, pattern, by=by or ("layer",), like=batch or tokens(0))


# --- TransformerLens's own sweeps -------------------------------------------------------------------------

SWEEPS = {
    "resid_pre": ("blocks.*.hook_resid_pre", "layer", "pos"),
    "resid_mid": ("blocks.*.hook_resid_mid", "layer", "pos"),
    "attn_out": ("blocks.*.hook_attn_out", "layer", "pos"),
    "mlp_out": ("blocks.*.hook_mlp_out", "layer", "pos"),
    **{
        f"attn_head_{part}_by_pos": (f"blocks.*.attn.hook_{hook}", "layer", "pos", "head")
        for part, hook in zip(("out", "q", "k", "v"), "zqkv", strict=True)
    },
    **{
        f"attn_head_{part}_all_pos": (f"blocks.*.attn.hook_{hook}", "layer", "head")
        for part, hook in zip(("out", "q", "k", "v"), "zqkv", strict=True)
    },
    "attn_head_pattern_by_pos": ("blocks.*.attn.hook_pattern", "layer", "head", "pos"),
    "attn_head_pattern_all_pos": ("blocks.*.attn.hook_pattern", "layer", "head"),
    "attn_head_pattern_dest_src_pos": ("blocks.*.attn.hook_pattern", "layer", "head", "pos", "src"),
}
"""Of each family: its hook, and the axes of what it returns."""

STACKED = {
    "attn_head_all_pos_every": [f"attn_head_{part}_all_pos" for part in ("out", "q", "k", "v", "pattern")],
    "attn_head_by_pos_every": [f"attn_head_{part}_by_pos" for part in ("out", "q", "k", "v", "pattern")],
    "block_every": ["resid_pre", "attn_out", "mlp_out"],
}


def ours(model, contrasts, family, measure=measures.correct_logit, like=None, **settings):
    """The mean over contrasts of what a family returns, on its axes, and the Dataset."""
    pattern, *by = SWEEPS[family]
    chosen = everywhere(model, pattern, *by, batch=like)
    found = dy.patch_activations(dy.Recipe(model), None, contrasts, chosen, measure, **settings)
    shape = [len(set(found[axis].values)) for axis in by]
    order = np.lexsort([found[axis].values for axis in reversed(by)])
    return found["patched"].mean("example").values[..., order].reshape(*found["patched"].shape[:-2], *shape)


def theirs(model, contrasts, family):
    base, source = (concatenate([getattr(c, side) for c in contrasts]) for side in ("base", "source"))

    def metric(logits):
        return measures.correct_logit.from_logits(measures.at_target_pos(logits, base), base).mean()

    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        _, cache = model.run_with_cache(source.tokens)
        return getattr(patching, f"get_act_patch_{family}")(model, base.tokens, cache, metric).numpy()


@pytest.fixture(scope="module")
def toy():
    """A toy that has trained a little."""
    recipe = dy.Recipe(transformer(), measures.cross_entropy, ADAMW)
    return trained(recipe, [tokens(seed) for seed in range(20)]).model


def test_every_family_of_transformer_lens_is_compared():
    families = {n.removeprefix("get_act_patch_") for n in dir(patching) if n.startswith("get_act_patch_")}
    direct = {"direct_path", "direct_path_all_sources"}  # paths between two nodes are no activation's
    assert families - direct == {*SWEEPS, *STACKED}


@pytest.mark.parametrize("family", SWEEPS)
def test_it_is_what_transformer_lens_finds(toy, family):
    found = ours(toy, pairs(), family)
    expected = theirs(toy, pairs(), family)
    assert found.shape == expected.shape
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # theirs is stored in fp32


@pytest.mark.slow
@pytest.mark.parametrize("family", STACKED)
def test_it_is_what_transformer_lens_finds_for_several_activations_at_once(toy, family):
    expected = theirs(toy, pairs(), family)
    for part, stacked in zip(STACKED[family], expected, strict=True):
        found = ours(toy, pairs(), part)
        if part == "attn_head_pattern_by_pos":
            found = found.swapaxes(1, 2)
        np.testing.assert_allclose(found, stacked, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize(
    "pattern", ["hook_embed", "*ln*hook_*", "blocks.*.mlp.hook_p*", "blocks.1.attn", "*attn_scores"]
)
def test_other_hooks_and_modules_are_exchanged_as_well(name, pattern):
    model = transformer(**TOYS[name])
    try:
        chosen = everywhere(model, pattern, "layer", "pos")
    except SiteError:
        assert {"no norm": "ln", "attention only": "mlp"}[name] in pattern
        return
    pair = pairs(1)[0]
    found = dy.patch_activations(dy.Recipe(model), None, [pair], chosen, measures.correct_logit)
    values = outputs_of(model, pair.source, measures.correct_logit, [n for s in chosen for n in s.covers])
    for site in chosen:
        expected = patched_by_hand(model, pair.base, measures.correct_logit, site.covers, values)
        assert found["patched"].sel(site=site.label).item() == pytest.approx(expected, abs=1e-12)
    assert abs(found["effect"]).max() > 1e-3


# --- any module -------------------------------------------------------------------------------------------


def head_logit(model, batch):
    """A logit of each row at its scored position, whatever the model gives."""
    output = model(batch.tokens)
    return getattr(output, "logits", output)[torch.arange(len(batch)), batch.target_pos, 3]


def measure_of(name):
    return margin if name.startswith("MLP") or name == "convolutions" else head_logit


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_on_any_module_it_is_what_hooks_by_hand_find(name):
    recipe, measure = RECIPES[name](), measure_of(name)
    pair = dy.Contrast(batch_of(name, 10), batch_of(name, 11))
    hooks = [n for n in sites.hooks(recipe.model) if "." in n or name not in COARSE]  # no ModelOutput
    ran = outputs_of(recipe.model, pair.source, measure, hooks)
    chosen = [Site(n, {n: ...}) for n in hooks if n in ran][:12]
    chosen += [Site(f"{n} cut", {n: (ALL, 0)}) for n in hooks if n in ran and ran[n][0].ndim > 1][:12]
    chosen.append(Site("two", dict.fromkeys(list(ran)[1:3], ...)))
    found = dy.patch_activations(recipe, None, [pair], chosen, measure)
    for site in chosen:
        expected = patched_by_hand(recipe.model, pair.base, measure, site.covers, ran)
        assert found["patched"].sel(site=site.label).item() == pytest.approx(expected, abs=1e-12), site.label
    assert abs(found["effect"]).max() > 1e-3


def test_a_custom_module_is_what_its_forward_written_out_gives():
    model = made(Mlp).eval()
    (base, y), (source, _) = batch_of("MLP", 10), batch_of("MLP", 11)
    chosen = [
        Site("lower", {"lower": ...}),
        Site("unit", {"inner": (ALL, 2)}),
        Site("upper", {"upper": (ALL, 1)}),
    ]
    found = dy.patch_activations(
        dy.Recipe(model), None, [dy.Contrast((base, y), (source, y))], chosen, margin
    )

    def lower(x):
        return x @ model.lower.weight.T + model.lower.bias

    def inner(x):
        return F.gelu(lower(x)) @ model.inner.weight.T + model.inner.bias

    def upper(low, inn):
        return (F.gelu(low) + F.gelu(inn)) @ model.upper.weight.T + model.upper.bias

    def mean_margin(logits):
        return float((logits.gather(-1, y[:, None])[:, 0] - logits.mean(-1)).mean())

    model.requires_grad_(False)
    unit, last = inner(base).clone(), upper(lower(base), inner(base)).clone()
    unit[:, 2] = inner(source)[:, 2]
    last[:, 1] = upper(lower(source), inner(source))[:, 1]
    expected = [
        mean_margin(upper(lower(source), inner(source))),
        mean_margin(upper(lower(base), unit)),
        mean_margin(last),
    ]
    np.testing.assert_allclose(found["patched"].values[0], expected, rtol=0, atol=1e-12)


# --- identities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [measures.correct_logit, head_logit])
def test_an_activation_put_in_its_own_place_changes_nothing_and_a_full_cut_everything(toy, measure):
    chosen = [*everywhere(toy, "blocks.*.hook_resid_post"), *everywhere(toy, "blocks.*.attn.hook_z")]
    pair = pairs(1)[0]
    same = dy.patch_activations(
        dy.Recipe(toy), None, [dataclasses.replace(pair, source=pair.base)], chosen, measure
    )
    assert not same["effect"].any()
    found = dy.patch_activations(dy.Recipe(toy), None, [pair], chosen, measure)
    cut = found["level"].copy(data=["resid_post" in str(label) for label in found["site"].values])
    assert abs(found["patched"] - found["source"]).where(cut).max() < 1e-12
    assert abs(found["effect"].where(~cut)).min() > 1e-6


def test_reversed_contrasts_patch_the_other_way(toy):
    chosen = everywhere(toy, "blocks.0.hook_resid_pre", "layer", "pos")
    pair = pairs(1, rows=1)[0]
    noising = dy.patch_activations(dy.Recipe(toy), None, [pair.reversed()], chosen, measures.correct_logit)
    values = outputs_of(toy, pair.base, measures.correct_logit, ["blocks.0.hook_resid_pre"])
    for site in chosen:
        expected = patched_by_hand(toy, pair.source, measures.correct_logit, site.covers, values)
        assert noising["patched"].sel(site=site.label).item() == pytest.approx(expected, abs=1e-12)
    both = dy.both_directions(
        dy.patch_activations, dy.Recipe(toy), None, [pair], chosen, measures.correct_logit
    )
    assert (both["effect"].sel(direction="necessity") == noising["effect"]).all()


def test_contrasts_run_together_are_those_run_alone_and_keep_their_rows_apart(toy, monkeypatch):
    single = [dataclasses.replace(p, coords={"example": f"one {i}"}) for i, p in enumerate(pairs(3, rows=1))]
    uneven = [*pairs(2, rows=2), *single]
    chosen = everywhere(toy, "blocks.*.attn.hook_z", "layer", "head", "pos")
    ran, original = [], patching.generic_activation_patch

    def counted(model, tokens, *rest, **settings):
        ran.append(len(tokens))
        return original(model, tokens, *rest, **settings)

    monkeypatch.setattr(patching, "generic_activation_patch", counted)
    together = dy.patch_activations(dy.Recipe(toy), None, uneven, chosen, LOGITS)
    assert ran == [7, 7]  # one batch of all rows at each of the two hooks
    for i, pair in enumerate(uneven):
        alone = dy.patch_activations(dy.Recipe(toy), None, [pair], chosen, LOGITS)
        for name in ("patched", "base", "source", "effect"):
            np.testing.assert_allclose(
                together[name].isel(example=i).values, alone[name].isel(example=0).values, rtol=0, atol=1e-12
            )
    monkeypatch.setattr(forward_passes, "ROWS", 3)
    ran.clear()
    split = dy.patch_activations(dy.Recipe(toy), None, uneven, chosen, LOGITS)
    assert ran == [2, 2, 3, 3, 2, 2]
    np.testing.assert_allclose(split["patched"], together["patched"], rtol=0, atol=1e-12)


def test_prompts_of_other_lengths_run_apart(toy):
    pair = pairs(1)[0]
    cut = [
        dataclasses.replace(b, tokens=b.tokens[:, :3], target_pos=b.target_pos.clamp(max=2))
        for b in (pair.base, pair.source)
    ]
    short = dy.Contrast(*cut, coords={"example": "short"})
    mixed = [pairs(2)[0], short, pairs(2)[1]]
    chosen = everywhere(toy, "blocks.*.hook_mlp_out", "layer", "pos")[:3]
    found = dy.patch_activations(dy.Recipe(toy), None, mixed, chosen, LOGITS)
    for i, pair in enumerate(mixed):
        alone = dy.patch_activations(dy.Recipe(toy), None, [pair], chosen, LOGITS)
        np.testing.assert_allclose(found["patched"][:, i], alone["patched"][:, 0], rtol=0, atol=1e-12)


def test_several_measures_are_each_what_it_is_alone(toy):
    several = {**LOGITS, "head": head_logit, "scalar": lambda model, batch: model(batch.tokens).var()}
    chosen = everywhere(toy, "blocks.*.hook_attn_out", "layer", "pos")
    together = dy.patch_activations(dy.Recipe(toy), None, pairs(), chosen, several)
    assert together["effect"].dims == ("measure", "example", "site")
    assert together["units"].values.tolist() == ["logit", "nat", "", ""]
    for name, measure in several.items():
        alone = dy.patch_activations(dy.Recipe(toy), None, pairs(), chosen, measure)
        assert alone["effect"].dims == ("example", "site")
        np.testing.assert_allclose(
            together["patched"].sel(measure=name), alone["patched"], rtol=0, atol=1e-12
        )


def test_a_function_of_the_model_finds_what_the_logits_measure_finds(toy):
    """One goes through TransformerLens, the other through plain hooks."""
    chosen = [
        *everywhere(toy, "blocks.*.attn.hook_q", "layer", "head"),
        *everywhere(toy, "hook_embed", "pos"),
    ]
    lens = dy.patch_activations(dy.Recipe(toy), None, pairs(), chosen, measures.correct_logit)
    plain = dy.patch_activations(
        dy.Recipe(toy), None, pairs(), chosen, lambda m, b: measures.correct_logit(m, b)
    )
    np.testing.assert_allclose(lens["patched"], plain["patched"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("measure", [measures.correct_logit, head_logit])
def test_ablations_put_in_zero_or_the_mean_of_all_sources(toy, measure):
    contrasts = pairs(3)
    chosen = everywhere(toy, "blocks.*.attn.hook_z", "layer", "head")
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    kept = [outputs_of(toy, c.source, measure, names) for c in contrasts]
    means = {n: [torch.cat([k[n][0] for k in kept]).mean(0).expand(2, -1, -1, -1)] for n in names}
    zeros = {n: [torch.zeros_like(means[n][0])] for n in names}
    for values, expected in (("zero", zeros), ("mean", means)):
        found = dy.patch_activations(dy.Recipe(toy), None, contrasts, chosen, measure, values=values)
        for i, contrast in enumerate(contrasts):
            for site in chosen:
                by_hand = patched_by_hand(toy, contrast.base, measure, site.covers, expected)
                cell = found["patched"].isel(example=i).sel(site=site.label).item()
                assert cell == pytest.approx(by_hand, abs=1e-12)


def test_the_checkpoint_decides_the_weights(toy):
    recipe = dy.Recipe(transformer(), measures.cross_entropy, ADAMW)
    live = trained(recipe, [tokens(seed) for seed in range(3)])
    chosen = everywhere(recipe.model, "blocks.*.hook_resid_pre", "layer", "pos")
    at = dy.patch_activations(recipe, live.last, pairs(), chosen, LOGITS)
    own = dy.patch_activations(dy.Recipe(live.model), None, pairs(), chosen, LOGITS)
    before = dy.patch_activations(recipe, None, pairs(), chosen, LOGITS)
    np.testing.assert_array_equal(at["patched"], own["patched"])
    assert abs(at["patched"] - before["patched"]).min() > 1e-9


# --- what is left alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LN gelu", "convolutions", "MLP relu dropout", "GPT-2"])
@pytest.mark.parametrize("verb", [dy.patch_activations, dy.attribute_activations])
def test_model_hooks_modes_gradients_and_generators_stay_as_they_were(name, verb):
    recipe = RECIPES[name]()
    recipe.model.train()
    first = recipe.model.get_submodule(sites.hooks(recipe.model)[0])
    calls = []
    first.register_forward_hook(lambda *_: calls.append(1))
    state = {n: t.clone() for n, t in recipe.model.state_dict().items()}
    hooks = {n: len(m._forward_hooks) for n, m in recipe.model.named_modules()}
    drawn = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    pair = dy.Contrast(batch_of(name, 10), batch_of(name, 11))
    chosen = [Site(n, {n: ...}) for n in sites.hooks(recipe.model)[:3]]
    found = verb(recipe, None, [pair], chosen, measure_of(name))
    assert bool(np.isfinite(found["base"]).all())
    assert calls  # a hook of the user's takes part
    assert all(module.training for module in recipe.model.modules())
    assert all(torch.equal(t, state[n]) for n, t in recipe.model.state_dict().items())
    assert all(p.grad is None for p in recipe.model.parameters())
    assert {n: len(m._forward_hooks) for n, m in recipe.model.named_modules()} == hooks
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert (random.getstate(), str(np.random.get_state())) == drawn[1:]  # noqa: NPY002


def test_hooks_of_a_failed_call_are_gone(toy):
    def broken(model, batch):
        model(batch.tokens)
        raise RuntimeError("broken")

    before = {n: len(m._forward_hooks) for n, m in toy.named_modules()}
    with pytest.raises(RuntimeError, match="broken"):
        dy.patch_activations(dy.Recipe(toy), None, pairs(), everywhere(toy, "blocks.*"), broken)
    assert {n: len(m._forward_hooks) for n, m in toy.named_modules()} == before
    assert patching.tqdm is tqdm


def test_nothing_is_printed_and_no_bar_is_shown(toy, capfd):
    dy.patch_activations(dy.Recipe(toy), None, pairs(), everywhere(toy, "blocks.*.hook_mlp_out"), LOGITS)
    assert capfd.readouterr() == ("", "")


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [dy.patch_activations, dy.attribute_activations])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"contrasts": []}, ValueError, "given no contrasts"),
        ({"sites": []}, ValueError, "given no sites"),
        ({"sites": [Site("x", {"blocks.9": ...})]}, SiteError, "no submodule with an output"),
        ({"sites": [Site("x", {"hook_embed": (ALL, 9)})]}, SiteError, "reads index 9 on axis 1"),
        ({"sites": [Site("x", {"hook_embed": ...}, positions=(1,))]}, SiteError, "has positions"),
        ({"sites": [Site("x", {"hook_embed": ...})] * 2}, SiteError, "more than once"),
        ({"values": "noise"}, ValueError, "one of .'source', 'zero', 'mean'."),
        ({"contrasts": [pairs(1)[0], pairs(1)[0]]}, ValueError, "share a label"),
        ({"checkpoint": "other"}, RecipeError, "does not fit the recipe's model"),
        (
            {"contrasts": [dataclasses.replace(pairs(1)[0], source=tokens(1, 3))]},
            SiteError,
            r"'hook_embed' has shape \(2, 4, 8\) in the base run and \(3, 4, 8\) in the source run",
        ),
    ],
)
def test_a_call_that_cannot_be_is_refused(toy, verb, change, error, says):
    from checkpoints import Checkpoint

    if "checkpoint" in change:
        change = {"checkpoint": Checkpoint.capture(made(Mlp))}
    call = {
        "checkpoint": None,
        "contrasts": pairs(),
        "sites": [Site("x", {"hook_embed": ...})],
        "measure": measures.correct_logit,
        **change,
    }
    with pytest.raises(error, match=says):
        verb(dy.Recipe(toy), **call)


def test_a_module_that_runs_another_number_of_times_is_refused():
    class Repeated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, batch):
            x, times = batch
            for _ in range(times):
                x = self.layer(x)
            return x

    model = Repeated()
    pair = dy.Contrast((torch.ones(2, 3), 1), (torch.ones(2, 3), 2))
    with pytest.raises(SiteError, match="runs 1 times in the base run and 2 times in the source run"):
        dy.patch_activations(
            dy.Recipe(model), None, [pair], [Site("x", {"layer": ...})], lambda m, b: m(b).sum(-1)
        )


def test_a_module_that_never_runs_is_refused():
    recipe = RECIPES["odd"]()
    pair = dy.Contrast(tokens(0), tokens(1))
    with pytest.raises(SiteError, match="gave no floating-point tensor"):
        dy.patch_activations(recipe, None, [pair], [Site("x", {"idle": ...})], head_logit)


def test_the_variance_of_all_rows_is_not_batched():
    recipe = RECIPES["MLP"]()
    contrasts = [
        dy.Contrast(batch_of("MLP", i), batch_of("MLP", i + 1), coords={"example": str(i)}) for i in range(3)
    ]
    chosen = [Site("inner", {"inner": ...})]
    found = dy.patch_activations(recipe, None, contrasts, chosen, spread)
    for i, contrast in enumerate(contrasts):
        values = outputs_of(recipe.model, contrast.source, spread, ["inner"])
        expected = patched_by_hand(recipe.model, contrast.base, spread, {"inner": ...}, values)
        assert found["patched"].values[i, 0] == pytest.approx(expected, abs=1e-12)
    assert D_VOCAB == 11
