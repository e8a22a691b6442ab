"""Factors beside explicit outer products Σ δ xᵀ of tensors that ordinary hooks captured."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site
from tests.oracles.seed_patching import backward, seed_patch
from tests.zoo.signal_models import (
    ALL,
    RECIPES,
    TOYS,
    begun,
    contrast_of,
    filled,
    first,
    instead,
    off,
    read_by_hand,
    revealed,
    revealed_factors,
    tolerance_of,
)
from tests.zoo.small_models import ADAMW, CLIPS, OPTIMIZERS

FACTORS = {"x": ("source", "base"), "delta": ("base", "source"), "both": ("source", "source")}
EPS = 1e-5  # of the toy's norms


# --- what each parameter's gradient is made of ------------------------------------------------------------


def of_toy(recipe, live, batches):
    """Of each run: {parameter: x}, {parameter: δ}, and {parameter: (x, δ) -> gradient}, for the toy."""
    model, found = recipe.model, {}
    names = sites.hooks(model)
    for run, batch in batches.items():
        values, signals = (
            {n: runs[0] for n, runs in kept.items()} for kept in read_by_hand(recipe, live, batch, names)
        )
        x = {"embed.W_E": batch.tokens, "pos_embed.W_pos": batch.tokens}
        delta = {"embed.W_E": signals["embed"], "pos_embed.W_pos": signals["pos_embed"]}

        def norm(name, before, values=values, signals=signals, x=x, delta=delta):
            for part in ("w", "b"):
                x[f"{name}.{part}"], delta[f"{name}.{part}"] = values[before], signals[name]

        for i in range(2):
            block = f"blocks.{i}"
            attn, mlp = f"{block}.attn", f"{block}.mlp"
            for part in "QKV":
                for kind in "Wb":
                    x[f"{attn}.{kind}_{part}"] = values[f"{block}.ln1"]
                    delta[f"{attn}.{kind}_{part}"] = signals[f"{attn}.hook_{part.lower()}"]
            for kind in "Wb":
                x[f"{attn}.{kind}_O"] = values[f"{attn}.hook_z"]
                delta[f"{attn}.{kind}_O"] = signals[attn]
            norm(f"{block}.ln1", f"{block}.hook_resid_pre")
            if mlp in values:
                for kind in "Wb":
                    x[f"{mlp}.{kind}_in"] = values[f"{block}.ln2"]
                    delta[f"{mlp}.{kind}_in"] = signals[f"{mlp}.hook_pre"]
                    x[f"{mlp}.{kind}_out"] = values[f"{mlp}.hook_post"]
                    delta[f"{mlp}.{kind}_out"] = signals[mlp]
                norm(f"{block}.ln2", f"{block}.hook_resid_mid")
        norm("ln_final", "blocks.1.hook_resid_post")
        for kind in "Wb":
            x[f"unembed.{kind}_U"], delta[f"unembed.{kind}_U"] = values["ln_final"], signals["unembed"]
        found[run] = x, delta
    return found


def toy_gradient(model, name, x, delta):
    """Σ δ xᵀ over rows and positions of what is given, einsum by einsum."""
    last = name.rpartition(".")[2]
    parameter = model.get_parameter(name)
    if last == "W_E":
        rows = torch.zeros_like(parameter)
        for token, signal in zip(x.flatten(), delta.flatten(0, 1), strict=True):
            rows[token] += signal
        return rows
    if last in ("W_Q", "W_K", "W_V"):
        return torch.einsum("bpd,bphe->hde", x, delta)
    if last == "W_O":
        return torch.einsum("bphe,bpd->hed", x, delta)
    if last in ("W_in", "W_out", "W_U"):
        return torch.einsum("bpi,bpo->io", x, delta)
    if last == "w":
        x = x - x.mean(-1, keepdim=True) if f"{name[:-1]}b" in dict(model.named_parameters()) else x
        return (delta * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()).sum((0, 1))
    assert last.startswith("b"), name
    return delta.sum((0, 1))


class Toy:
    """The corners of the toy's gradient, written out."""

    def __init__(self, name, **changes):
        self.recipe, self.pair = dataclasses.replace(RECIPES[name](), **changes), contrast_of(name)
        self.live = begun(self.recipe, name)
        runs = {"base": self.pair.base, "source": self.pair.source}
        self.runs = of_toy(self.recipe, self.live, runs)

    def contribution(self, name, x, delta, positions):
        at = list(range(4)) if positions is None else list(positions)
        if name == "pos_embed.W_pos":
            parameter = torch.zeros_like(self.recipe.model.get_parameter(name))
            parameter[at] = self.runs[delta][1][name][:, at].sum(0)
            return parameter
        return toy_gradient(
            self.recipe.model, name, self.runs[x][0][name][:, at], self.runs[delta][1][name][:, at]
        )

    def corner(self, factor, positions=None):
        """The base gradient with what the positions contribute made of that factor of the source."""
        x, delta = FACTORS[factor]
        base = filled(self.recipe.model, backward(self.recipe, self.live.model, self.pair.base))
        return {
            n: g - self.contribution(n, "base", "base", positions) + self.contribution(n, x, delta, positions)
            for n, g in base.items()
        }


class Layers:
    """The same of any model, module by module: of linear layers, Conv1D, norms and embeddings."""

    def __init__(self, name, **changes):
        self.recipe, self.pair = dataclasses.replace(RECIPES[name](), **changes), contrast_of(name)
        self.live = begun(self.recipe, name)
        self.owners = {
            n: m for n, m in self.recipe.model.named_modules() if list(m.parameters(recurse=False))
        }
        self.runs = {"base": self.read(self.pair.base), "source": self.read(self.pair.source)}

    def read(self, batch):
        """(inputs, signals) of every run of every layer."""
        model, kept = copy.deepcopy(self.live.model), {n: [] for n in self.owners}

        def keeper(name):
            def keep(module, inputs, output):
                out = first(output).clone()
                out = out if out.requires_grad else out.requires_grad_()
                out.retain_grad()
                kept[name].append((inputs[0].detach(), out))
                return instead(output, out.clone())

            return keep

        for n in self.owners:
            model.get_submodule(n).register_forward_hook(keeper(n))
        with self.live.last.random_state():
            self.recipe.loss(model, batch).backward()
        return {
            n: [(x, torch.zeros_like(out) if out.grad is None else out.grad) for x, out in runs]
            for n, runs in kept.items()
        }

    def layer(self, module, x, delta):
        """{parameter: Σ δ xᵀ}."""
        if isinstance(module, nn.Embedding):
            rows = torch.zeros_like(module.weight)
            return {"weight": rows.index_add(0, x.flatten(), delta.flatten(0, -2))}
        if isinstance(module, nn.LayerNorm):
            plain = layer_norm(x, module.normalized_shape, eps=module.eps)
            return {"weight": (delta * plain).flatten(0, -2).sum(0), "bias": delta.flatten(0, -2).sum(0)}
        if isinstance(module, LlamaRMSNorm):
            scale = (x.float().square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
            return {"weight": (delta * (x.float() * scale).to(x.dtype)).flatten(0, -2).sum(0)}
        flat_x, flat_delta = x.flatten(0, -2), delta.flatten(0, -2)
        if isinstance(module, Conv1D):
            return {"weight": flat_x.T @ flat_delta, "bias": flat_delta.sum(0)}
        assert isinstance(module, nn.Linear), type(module)
        return {"weight": flat_delta.T @ flat_x, "bias": flat_delta.sum(0)}

    def total(self, x, delta, positions):
        canonical = {id(p): n for n, p in self.recipe.model.named_parameters()}
        total = {n: torch.zeros_like(p) for n, p in self.recipe.model.named_parameters()}
        for owner, module in self.owners.items():
            for (read, _), (_, signal) in zip(self.runs[x][owner], self.runs[delta][owner], strict=True):
                at = slice(None) if positions is None else list(positions)
                parts = self.layer(
                    module, *((read, signal) if positions is None else (read[:, at], signal[:, at]))
                )
                for n, parameter in module.named_parameters(recurse=False):
                    total[canonical[id(parameter)]] += parts[n]
        return total

    def corner(self, factor, positions=None):
        base = filled(self.recipe.model, backward(self.recipe, self.live.model, self.pair.base))
        ours, theirs = (self.total(*runs, positions) for runs in (("base", "base"), FACTORS[factor]))
        trained = {n for n, p in self.recipe.model.named_parameters() if p.requires_grad}
        return {n: g - ours[n] + theirs[n] if n in trained else g for n, g in base.items()}


def bench_of(name, **changes):
    return (Toy if name in TOYS else Layers)(name, **changes)


def whole(recipe, label="every parameter"):
    """All parameters that are in use as one site."""
    unused = ("idle", "aside")
    named = dict(recipe.model.named_parameters())
    return Site(label, {n: ... for n, p in named.items() if p.requires_grad and not n.startswith(unused)})


# --- gradients --------------------------------------------------------------------------------------------

POSITIONS = {"at 0": (0,), "at 1 and 3": (1, 3), "at the last": (-1,), "at all": (0, 1, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TOYS, "tied", "odd", "GPT-2", "GPT-NeoX", "Llama"])
def test_every_corner_is_the_outer_products_written_out_over_all_positions_and_over_some(name):
    bench = bench_of(name)
    everywhere = whole(bench.recipe)
    patched = [everywhere]
    for label, positions in POSITIONS.items():
        patched.append(dataclasses.replace(everywhere, label=label, positions=positions))
    found = revealed_factors(bench.recipe, bench.live.last, bench.pair, patched)
    for site in patched:
        for factor in FACTORS:
            expected = bench.corner(factor, site.positions)
            assert off(found[site.label, factor], expected) < tolerance_of(name), (site.label, factor)
            if site.positions in (None, (1, 3)):
                assert off(found[site.label, factor], found["base"]) > 1e-3, (site.label, factor)


@pytest.mark.parametrize("name", ["MLP", "LSTM", "convolutions"])
def test_layers_without_positions_have_corners_too(name):
    """Of LSTM and convolutions the head: what stands below has no outer product that is as simple."""
    recipe, pair = RECIPES[name](), contrast_of(name)
    live = begun(recipe, name)
    head = {"MLP": "upper", "LSTM": "head", "convolutions": "head"}[name]
    covers = {f"{head}.weight": ..., f"{head}.bias": ...}
    found = revealed_factors(recipe, live.last, pair, [Site("head", covers)])
    runs = {}
    for run, batch in (("base", pair.base), ("source", pair.source)):
        twin, kept = copy.deepcopy(live.model), []
        twin.get_submodule(head).register_forward_hook(
            lambda _, inputs, out, kept=kept: kept.append((inputs[0], out))
        )
        loss = recipe.loss(twin, batch)
        ((x, out),) = kept
        runs[run] = x.detach().flatten(0, -2), torch.autograd.grad(loss, out)[0].flatten(0, -2)
    for factor, (x, delta) in FACTORS.items():
        expected = {
            f"{head}.weight": runs[delta][1].T @ runs[x][0],
            f"{head}.bias": runs[delta][1].sum(0),
        }
        assert off({n: found["head", factor][n] for n in covers}, expected) < 1e-12
        others = {n: g for n, g in found["base"].items() if n not in covers}
        assert off({n: found["head", factor][n] for n in others}, others) == 0


@pytest.mark.parametrize("name", ["LN gelu", "GPT-2"])
def test_patch_gradients_at_positions_exchanges_what_those_positions_contribute(name):
    bench = bench_of(name)
    everywhere = whole(bench.recipe)
    patched = sites.at_positions([everywhere], {"one": 1, "two": [0, 2], "all": range(4)})
    found = revealed(dy.patch_gradients, bench.recipe, bench.live.last, bench.pair, patched)
    for site in patched:
        expected = bench.corner("both", site.positions)
        assert off(found[site.label], expected) < tolerance_of(name), site.label
    assert off(found["every parameter @ all"], found["source"]) < tolerance_of(name)
    assert off(found["every parameter @ one"], found["source"]) > 1e-2


def test_a_slice_of_a_corner_is_exchanged_and_the_rest_keeps_its_bits():
    """Heads, rows of the embedding, a mask; at positions and at all."""
    bench = bench_of("LN gelu")
    mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    slices = {
        "head": {"blocks.1.attn.W_V": (1,), "blocks.1.attn.b_V": (1,)},
        "columns": {"blocks.0.attn.W_O": (ALL, ALL, slice(2, 5))},
        "token": {"embed.W_E": (3,)},
        "mask": {"blocks.1.mlp.W_in": mask},
    }
    patched = [Site(label, covers) for label, covers in slices.items()]
    patched += sites.at_positions(patched, {"1": 1})
    found = revealed_factors(bench.recipe, bench.live.last, bench.pair, patched)
    for site in patched:
        for factor in FACTORS:
            corner, gradient = bench.corner(factor, site.positions), found[site.label, factor]
            for name, base in found["base"].items():
                covered = torch.zeros_like(base, dtype=torch.bool)
                if name in site.covers:
                    covered[site.covers[name]] = True
                assert torch.equal(gradient[name][~covered], base[~covered])
                error = (gradient[name] - corner[name])[covered]
                assert not len(error) or float(error.abs().max()) < 1e-13


# --- the step and what is measured after it ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clip", "optimizer", "start"),
    [
        ("unclipped", "AdamW", "fresh"),
        ("unclipped", "SGD momentum", "warm"),
        ("by norm", "AdamW", "warm"),
        ("by norm", "SGD momentum", "fresh"),
        ("by value", "AdamW", "fresh"),
        ("by value", "SGD momentum", "warm"),
    ],
)
def test_the_step_is_that_of_torchs_clipping_and_optimizer_on_the_corner(clip, optimizer, start):
    bench = bench_of("LN gelu", optimizer=OPTIMIZERS[optimizer], clip=CLIPS[clip])
    measures = {m.name: m for m in (dy.measures.correct_logit, dy.measures.logit_difference)}
    recipe, live = bench.recipe, bench.live
    checkpoint = live.last.with_fresh_optimizer() if start == "fresh" else live.last
    patched = sites.matching(recipe.model, {"values": "*.W_V", "the rest": ["*.mlp.*", "*ln*", "*embed*"]})
    patched += sites.at_positions(patched[:1], {"1": 1})
    result = dy.patch_factors(recipe, checkpoint, [bench.pair], patched, measures)
    base = backward(recipe, live.model, bench.pair.base)
    for site in patched:
        for factor in FACTORS:
            gradients = base, bench.corner(factor, site.positions)
            expected = seed_patch(recipe, live, bench.pair, site, measures, start == "fresh", gradients)
            for measure, value in expected.items():
                cell = result["patched"].sel(site=site.label, factor=factor, measure=measure).item()
                assert abs(cell - value) < 1e-10 * max(1.0, abs(value)), (site.label, factor, measure)
    assert float(abs(result["effect"]).max()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MLP", "tied", "GPT-2", "Llama"])
def test_the_step_of_other_models_is_that_of_their_own_optimizer_too(name):
    bench = Layers(name, optimizer=ADAMW, clip=CLIPS["by norm"])
    recipe, live = bench.recipe, bench.live
    measure = dy.measures.correct_logit if name != "MLP" else spread
    base = backward(recipe, live.model, bench.pair.base)
    patched = sites.parameters(recipe.model)[::3]
    result = dy.patch_factors(recipe, live.last, [bench.pair], patched, measure)
    tolerance = 1e-6 if tolerance_of(name) > 1e-10 else 1e-10
    for site in patched:
        for factor in FACTORS:
            gradients = base, bench.corner(factor)
            expected = seed_patch(recipe, live, bench.pair, site, {"": measure}, False, gradients)[""]
            cell = result["patched"].sel(site=site.label, factor=factor).item()
            assert abs(cell - expected) < tolerance * max(1.0, abs(expected)), (site.label, factor)


def spread(model, batch):
    return model(batch[0]).var()
