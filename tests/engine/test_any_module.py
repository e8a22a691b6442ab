"""Every verb on any module: tied, frozen, skipped, sparse, recurrent, with several dtypes, buffers, dropout."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import EllipsisType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_models import (
    ADAMW,
    LOOPED,
    OPTIMIZERS,
    Tied,
    classifier,
    classifier_loss,
    classifier_recipe,
    draws,
    margin,
    outcomes,
    perturbed,
    points,
    same,
    trained,
    two_groups,
)
from test_engine_unused import Counting, Routed
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dynamics as dy
from checkpoints import Checkpoint
from checkpoints.values import copied, differences
from dynamics import sites
from dynamics.recipe import ByNorm, RecipeError
from dynamics.sites import Site, SiteError
from dynamics.steps import NonFiniteGradient
from dynamics.steps.clipping import clipped
from dynamics.trees import exchanged, squared_norm

N_WORDS = 9


# --- modules ----------------------------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding, something in the middle, a head: tokens [batch, pos] -> logits [batch, 3]."""

    def __init__(self, middle: nn.Module, sparse: bool = False, d: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(N_WORDS, d, sparse=sparse)
        self.middle = middle
        self.head = nn.Linear(d, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.middle(self.embed(tokens))
        found = found[0] if isinstance(found, tuple) else found
        return self.head(found.to(self.head.weight.dtype).tanh()).mean(1)


class Odd(nn.Module):
    """Parameters in lists and without axes, a buffer that counts, one that is not saved, a frozen table."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 3))])
        self.named = nn.ParameterDict(
            {"gain": nn.Parameter(torch.ones(())), "unused": nn.Parameter(torch.ones(2))}
        )
        self.table = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean.lerp_(x.detach().mean(0), 0.1)
        hidden = ((x - self.mean) @ self.layers[0] + self.table).tanh()
        return hidden @ self.layers[1] * self.named["gain"]


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x[:, None])).relu().mean(-1))


def words(seed: int) -> tuple[Tensor, Tensor]:
    generator = draws(seed)
    return torch.randint(N_WORDS, (6, 3), generator=generator), torch.randint(3, (6,), generator=generator)


def tied_words(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (2, 8), generator=draws(seed)).unbind(0)


def routed_words(seed: int) -> tuple[Any, str]:
    return points(seed), "left" if seed % 2 == 0 else "right"


def routed_loss(model: nn.Module, batch: Any) -> Tensor:
    (x, y), route = batch
    return F.cross_entropy(model(x, route), y)


def routed_measure(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0][0], "left") * model(batch[0][0], "right")).sum()


def mixed() -> nn.Module:
    """A single-precision embedding under a double-precision head."""
    model = Words(nn.Linear(4, 4)).double()
    model.embed.float()
    model.middle.float()
    return model


def partly_bf16() -> nn.Module:
    model = Words(nn.Linear(4, 4))
    model.embed.bfloat16()
    model.middle.bfloat16()
    return model


def frozen() -> nn.Module:
    model = Words(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4))).double()
    model.embed.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    return model


@dataclass(frozen=True)
class Kind:
    """A module, what it is trained on, and how exact its arithmetic is."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Any] = words
    loss: Callable[[Any, Any], Tensor] = classifier_loss
    measure: Callable[[Any, Any], Any] = margin
    optimizer: Callable[[Any], Any] = ADAMW
    tolerance: float = 1e-12
    has_factors: bool = True


def layered(middle: Callable[[], nn.Module], **options: Any) -> Kind:
    return Kind(lambda: Words(middle()).double(), **options)


KINDS = {
    "tied": Kind(lambda: Tied().double(), tied_words),
    "batch norm, dropout, a temperature": Kind(lambda: classifier(True, 0.3), points, has_factors=False),
    "two groups": Kind(lambda: classifier(True), points, optimizer=two_groups, has_factors=False),
    "frozen": Kind(frozen, tolerance=1e-12),
    "skipped": Kind(lambda: Routed().double(), routed_words, routed_loss, routed_measure),
    "of two precisions": Kind(mixed, tolerance=1e-6),
    "partly bf16": Kind(partly_bf16, optimizer=OPTIMIZERS["SGD momentum"], tolerance=0.02),
    "GRU": layered(lambda: nn.GRU(4, 4, batch_first=True)),
    "LSTM": layered(lambda: nn.LSTM(4, 4, batch_first=True, bidirectional=False)),
    "LSTM with dropout": layered(
        lambda: nn.LSTM(4, 4, num_layers=2, dropout=0.4, batch_first=True), has_factors=False
    ),
    "transformer layer": layered(
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True), has_factors=False
    ),
    "convolution": Kind(lambda: Picture().double(), points),
    "odd": Kind(lambda: Odd().double(), points, has_factors=False),
    "weight norm": layered(lambda: parametrizations.weight_norm(nn.Linear(4, 4)), has_factors=False),
    "spectral norm": layered(lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), has_factors=False),
    "a buffer assigned anew": Kind(lambda: Counting().double(), points),
    "sparse": Kind(
        lambda: Words(nn.Dropout(0.3), sparse=True).double(),
        optimizer=OPTIMIZERS["SGD momentum"],
        has_factors=False,
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)

VERBS: dict[str, Callable[..., Any]] = {
    "gradients": dy.patch_gradients,
    "updates": dy.patch_updates,
    "window": dy.patch_window,
    "signals": dy.patch_signals,
    "signals, source forward": partial(dy.patch_signals, forward="source"),
    "factors": dy.patch_factors,
}
every_verb = pytest.mark.parametrize("verb", VERBS)
gradients_and_updates = pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])


def made(kind: str) -> tuple[dy.Recipe, Any]:
    """A recipe that clips by norm, and its model after three steps of training."""
    given = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = perturbed(given.make(), scale=0.02)
    recipe = dy.Recipe(model, given.loss, given.optimizer, max_grad_norm=0.1)
    unclipped = replace(recipe, clip=None)  # torch clips no sparse gradients
    return recipe, trained(unclipped, [given.batch(seed) for seed in range(3)], seed=4)


def sites_of(verb: str, model: nn.Module) -> list[Site]:
    """Whole parameters and a slice of each, buffers too; for signals the outputs of layers."""
    if "signals" in verb:
        return [
            Site(name, {name: ...})
            for name, module in model.named_modules()
            if name and not list(module.children()) and name != "middle.self_attn.out_proj"  # is not called
        ]
    named = [(n, p) for n, p in model.named_parameters() if verb != "factors" or p.requires_grad]
    whole, part = (
        [Site(n, {n: ...}) for n, _ in named],
        [Site(f"part of {n}", {n: (0,)}) for n, p in named if p.ndim],
    )
    return [*whole, *part] + ([] if verb == "factors" else [sites.everything(model)])


def contrast_of(verb: str, kind: str, identical: bool = False) -> dy.Contrast:
    batch = KINDS[kind].batch
    base, source = [batch(10), batch(12)], [batch(11), batch(13)]
    if identical:
        source = copy.deepcopy(base)
    if verb == "window":
        return dy.Contrast(base, source, batch(14))
    return dy.Contrast(base[0], source[0], batch(14))


def usable(verb: str, kind: str) -> bool:
    """Signals need outputs that both runs give; factors need layers that make up their gradient."""
    if verb == "factors":
        return KINDS[kind].has_factors and kind != "skipped"
    return "signals" not in verb or kind not in ("skipped", "odd")


every_usable = pytest.mark.parametrize(
    ("verb", "kind"), [(verb, kind) for verb in VERBS for kind in KINDS if usable(verb, kind)]
)


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of an element, relative to the largest element."""
    assert one.keys() == other.keys()
    floats = [name for name, tensor in one.items() if tensor.is_floating_point()]
    assert all(torch.equal(one[n], other[n]) for n in one.keys() - set(floats))
    scale = max(float(one[name].detach().abs().max()) for name in floats)
    return max(float((one[n].detach() - other[n].detach()).double().abs().max()) for n in floats) / scale


# --- what holds for every verb and module ---------------------------------------------------------------------


@every_usable
def test_a_batch_exchanged_with_its_copy_has_no_effect_at_all(verb, kind):
    """So both runs see the same dropout masks, and nothing of the one reaches the other."""
    recipe, live = made(kind)
    patched = sites_of(verb, recipe.model)
    contrast = contrast_of(verb, kind, identical=True)
    result = VERBS[verb](recipe, live.last, [contrast], patched, KINDS[kind].measure)
    assert (result["source"] == result["base"]).all()
    assert (result["effect"] == 0).all()
    assert (result["untouched"] != result["base"]).all()


@every_usable
def test_a_verb_leaves_the_model_the_checkpoint_and_the_generators_as_they_were(verb, kind):
    recipe, live = made(kind)
    model = recipe.model
    next(iter(model.modules())).train(False)
    model.train()

    def seen() -> Any:
        return copied(
            {
                "tensors": dict([*model.named_parameters(), *model.named_buffers()]),
                "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
                "gradients": [p.grad for p in model.parameters()],
                "trained": [p.requires_grad for p in model.parameters()],
                "modes": [module.training for module in model.modules()],
                "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
                "checkpoint": [live.last.parameters, live.last.buffers],
                "generator": torch.get_rng_state(),
            }
        )

    before = seen()
    patched = sites_of(verb, model)[::3]
    result = VERBS[verb](recipe, live.last, [contrast_of(verb, kind)], patched, KINDS[kind].measure)
    assert differences(before, seen()) == []
    assert (result["effect"] != 0).any()


@every_kind
@pytest.mark.parametrize("verb", ["gradients", "window"])
def test_base_and_source_are_the_steps_training_takes(verb, kind):
    recipe, live = made(kind)
    recipe = replace(recipe, clip=None)
    contrast = contrast_of(verb, kind)
    found = outcomes(VERBS[verb], recipe, live.last, contrast, [sites.everything(recipe.model)])
    for name, batches in (("base", contrast.base), ("source", contrast.source)):
        expected = dy.steps.advance(
            recipe,
            live.last,
            5 if verb == "window" else 4,
            lambda step, batches=batches: batches[step - 3] if verb == "window" else batches,
        )
        assert far(found[name], expected.parameters | expected.buffers) < 1e-12
    assert same(found["everything"], found["source"])
    assert not same(found["base"], found["source"])


# --- beside a training loop ----------------------------------------------------------------------------------


def clip_by_norm(parameters: list[nn.Parameter], limit: float) -> None:
    """As torch's own, which takes no sparse gradients."""
    present = [p for p in parameters if p.grad is not None]
    total = sum(float(p.grad.to_dense().double().square().sum()) for p in present) ** 0.5
    for p in present:
        p.grad = p.grad * min(1.0, limit / (total + 1e-6))


def slow_window(recipe: dy.Recipe, live: Any, contrast: dy.Contrast, site: Site) -> dict[str, Tensor]:
    """A training loop that overwrites .grad at the site before every step; the model after the last one."""
    model, optimizer = copy.deepcopy((live.model, live.optimizer))
    with live.last.random_state():
        for base, source in zip(contrast.base, contrast.source, strict=True):
            before, generator = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
            model.zero_grad()
            recipe.loss(model, source).backward()
            theirs = {name: p.grad for name, p in model.named_parameters()}
            moved = copy.deepcopy(dict(model.named_buffers()))
            for name, buffer in before.items():
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, buffer.clone())
            torch.set_rng_state(generator)
            model.zero_grad()
            recipe.loss(model, base).backward()
            for name, index in site.covers.items():
                if name in moved:
                    model.get_buffer(name)[index] = moved[name][index]
                else:
                    overwrite(model.get_parameter(name), theirs[name], index)
            if recipe.clip:
                clip_by_norm([p for g in optimizer.param_groups for p in g["params"]], recipe.clip.max_norm)
            optimizer.step()
    return dict([*model.named_parameters(), *model.named_buffers()])


def overwrite(parameter: nn.Parameter, source: Tensor | None, index: Any) -> None:
    if isinstance(index, EllipsisType):
        parameter.grad = source
        return
    given = [g for g in (parameter.grad, source) if g is not None]
    if not given:
        return
    zero = torch.zeros_like(parameter)
    ours, theirs = (zero if g is None else g.to_dense() for g in (parameter.grad, source))
    ours = ours.clone()
    ours[index] = theirs[index]
    parameter.grad = ours.to_sparse(1) if all(g.is_sparse for g in given) else ours


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


def slow_signal(recipe: dy.Recipe, live: Any, contrast: dy.Contrast, name: str) -> dict[str, Tensor | None]:
    """Gradients of the base batch with the source's gradient written into the output's own, by tensor hooks."""
    kept: list[Tensor] = []

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        first(output).register_hook(lambda g: kept.append(g.clone()))

    def replace_it(module: nn.Module, inputs: Any, output: Any) -> None:
        first(output).register_hook(lambda g: kept[0])

    for batch, hook in ((contrast.source, keep), (contrast.base, replace_it)):
        model = copy.deepcopy(live.model)
        model.get_submodule(name).register_forward_hook(hook)
        model.zero_grad()
        with live.last.random_state():
            recipe.loss(model, batch).backward()
    return {n: p.grad for n, p in model.named_parameters()}


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


# --- particular modules --------------------------------------------------------------------------------------


def test_base_and_source_see_the_same_dropout_mask_at_every_verb():
    """Dropout of one input channel at a time, told by which weights have a gradient."""
    masks: list[Tensor] = []

    class Watched(nn.Dropout):
        def forward(self, x):
            out = super().forward(x)
            if self.training:
                masks.append((out == 0).clone())
            return out

    model = classifier(dropout=0.5)
    model.drop = Watched(0.5)
    recipe = classifier_recipe(model=model)
    checkpoint = trained(recipe, [points(0)]).last
    pair = dy.Contrast(points(10), points(11), points(12))
    for verb, patched in (
        (dy.patch_gradients, sites.parameters(model)),
        (dy.patch_updates, sites.parameters(model)),
        (dy.patch_signals, sites.activations(model, "drop")),
        (dy.patch_factors, sites.matching(model, {"head": "head.*"})),
    ):
        masks.clear()
        verb(recipe, checkpoint, [pair], patched, margin)
        assert len(masks) >= 2
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    masks.clear()
    window = dy.Contrast([points(10), points(13)], [points(11), points(14)], points(12))
    dy.patch_window(recipe, checkpoint, [window], sites.parameters(model)[:2], margin)
    base, source, coasted, *patched = masks[:2], masks[2:4], masks[4:6], masks[6:10], masks[10:14]
    assert not torch.equal(base[0], base[1])
    for first, second in (base, source, coasted):
        assert torch.equal(first, base[0])
        assert torch.equal(second, base[1])
    for one in patched:
        assert all(torch.equal(mask, base[i // 2]) for i, mask in enumerate(one))


@gradients_and_updates
def test_a_tied_parameter_is_one_site_under_its_first_name_and_both_ends_move(verb):
    recipe, live = made("tied")
    assert "unembed.weight" not in dict(recipe.model.named_parameters())
    ends = []

    def measure(model, batch):
        ends.append(torch.equal(model.embed.weight, model.unembed.weight))
        return margin(model, batch)

    verb(recipe, live.last, [contrast_of("", "tied")], sites.parameters(recipe.model), measure)
    assert ends
    assert all(ends)


def test_tensors_keep_their_dtypes_through_every_verb():
    for kind in ("of two precisions", "partly bf16"):
        recipe, live = made(kind)
        for verb in ("gradients", "updates", "window"):
            found = outcomes(
                VERBS[verb], recipe, live.last, contrast_of(verb, kind), sites_of(verb, recipe.model)
            )
            for tensors in found.values():
                assert {n: t.dtype for n, t in tensors.items()} == {
                    n: t.dtype for n, t in recipe.model.named_parameters()
                }


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD maximize"])
def test_a_parameter_that_neither_batch_reaches_is_moved_by_no_step(optimizer):
    recipe, live = made("odd")
    recipe = replace(recipe, optimizer=OPTIMIZERS[optimizer])
    checkpoint = Checkpoint.capture(live.model)
    for verb in ("gradients", "updates", "window"):
        found = outcomes(
            VERBS[verb], recipe, checkpoint, contrast_of(verb, "odd"), sites_of(verb, recipe.model)
        )
        for label, tensors in found.items():
            assert torch.equal(tensors["named.unused"], checkpoint.parameters["named.unused"])
            assert torch.equal(tensors["table"], checkpoint.parameters["table"])
            assert torch.equal(tensors["named.gain"], checkpoint.parameters["named.gain"]) == (
                label == "untouched"
            )


def test_a_parameter_that_forward_writes_to_is_refused_by_name():
    """nn.Embedding(max_norm=) shortens the rows it looks up, in place: a step does not begin at the checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Words(nn.Identity()).double()
        model.embed = nn.Embedding(N_WORDS, 4, max_norm=0.5).double()
    recipe = dy.Recipe(model, classifier_loss, OPTIMIZERS["SGD"])
    pair = dy.Contrast(words(10), words(11), words(12))
    with pytest.raises(RecipeError, match=r"writes into embed\.weight"):
        dy.patch_gradients(recipe, None, [pair], sites.parameters(model), margin)


# --- sparse gradients ----------------------------------------------------------------------------------------


def embedding_alone(parameters: Any) -> Any:
    """SparseAdam takes sparse gradients only; the head is left to itself."""
    return torch.optim.SparseAdam([p for p in parameters if p.shape == (N_WORDS, 4)], lr=0.05)


SPARSE = {
    "SGD": OPTIMIZERS["SGD"],
    "SGD momentum": OPTIMIZERS["SGD momentum"],
    "SparseAdam": embedding_alone,
    "Adagrad": LOOPED["Adagrad"],
}
sparse_optimizers = pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            name,
            marks=[pytest.mark.filterwarnings("ignore:Sparse invariant checks")]  # torch's own, in Adagrad
            if name == "Adagrad"
            else [],
        )
        for name in SPARSE
    ],
)


def sparse(optimizer: str = "SGD", clip: Any = None, steps: int = 3) -> tuple[dy.Recipe, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Words(nn.Identity(), sparse=True).double()
    recipe = dy.Recipe(model, classifier_loss, SPARSE[optimizer], clip=clip)
    return recipe, trained(replace(recipe, clip=None), [words(seed) for seed in range(steps)], seed=4)


def sparse_pieces(model: nn.Module) -> list[Site]:
    scattered = torch.rand(N_WORDS, 4, generator=draws(0)) < 0.4
    return [
        Site("whole", {"embed.weight": ...}),
        Site("a row", {"embed.weight": (2,)}),
        Site("rows", {"embed.weight": (torch.tensor([1, 4, -1]),)}),
        Site("a column", {"embed.weight": (slice(None), 1)}),
        Site("a block", {"embed.weight": (slice(0, 6, 2), slice(1, 3)), "head.weight": (1,)}),
        Site("a mask", {"embed.weight": scattered}),
        Site("head", {"head.weight": ..., "head.bias": ...}),
        sites.everything(model),
    ]


@sparse_optimizers
@pytest.mark.parametrize("clip", [None, ByNorm(0.05)], ids=["unclipped", "by norm"])
@pytest.mark.parametrize("n", [1, 3])
def test_sparse_gradients_are_exchanged_as_in_a_loop_that_overwrites_grad(optimizer, clip, n):
    recipe, live = sparse(optimizer, clip)
    patched = sparse_pieces(recipe.model)
    window = dy.Contrast([words(10 + i) for i in range(n)], [words(20 + i) for i in range(n)], words(30))
    pair = dy.Contrast(window.base[0], window.source[0], window.probe)
    verb, given = (dy.patch_gradients, pair) if n == 1 else (dy.patch_window, window)
    found = outcomes(verb, recipe, live.last, given, patched)
    for site in patched:
        assert far(found[site.label], slow_window(recipe, live, window, site)) < 1e-13, site.label
        reached = site.label != "head" or optimizer != "SparseAdam"
        assert same(found[site.label], found["base"]) != reached


@gradients_and_updates
@sparse_optimizers
def test_sparse_patches_of_nothing_everything_and_unused_words_are_exact(verb, optimizer):
    recipe, live = sparse(optimizer, ByNorm(0.05))
    pair = dy.Contrast(*[(tokens.clamp(max=6), y) for tokens, y in (words(10), words(11))], words(12))
    patched = [
        Site("nothing", {"embed.weight": torch.zeros(N_WORDS, 4, dtype=torch.bool)}),
        Site("unused words", {"embed.weight": (slice(7, 9),)}),
        sites.everything(recipe.model),
    ]
    found = outcomes(verb, recipe, live.last, pair, patched)
    assert same(found["nothing"], found["base"])
    assert same(found["unused words"], found["base"])
    assert same(found["everything"], found["source"])
    assert not same(found["base"], found["source"])


@sparse_optimizers
def test_sparse_base_and_source_steps_are_those_of_training(optimizer):
    recipe, live = sparse(optimizer)
    pair = dy.Contrast(words(10), words(11), words(12))
    found = outcomes(dy.patch_gradients, recipe, live.last, pair, sparse_pieces(recipe.model))
    for name, batch in (("base", pair.base), ("source", pair.source)):
        after = dy.steps.replay(recipe, live.last, batch)
        assert far(found[name], after.parameters) < 1e-14


def test_a_sparse_and_a_dense_embedding_learn_the_same_under_sgd_at_every_site():
    recipe, live = sparse("SGD", ByNorm(0.05))
    dense = copy.deepcopy(recipe.model)
    dense.embed.sparse = False
    pair = dy.Contrast(words(10), words(11), words(12))
    patched = sparse_pieces(dense)
    one, other = (
        outcomes(dy.patch_gradients, replace(recipe, model=model), live.last, pair, patched)
        for model in (recipe.model, dense)
    )
    for label in one:
        assert far(one[label], other[label]) < 1e-15


def test_a_sparse_gradient_stays_sparse_with_each_word_once_and_sums_repeated_words():
    recipe, live = sparse()
    tokens = torch.tensor([[1, 1, 4], [4, 1, 8]])
    batch = tokens, torch.tensor([0, 2])
    found = dy.steps.gradient(recipe, live.last, batch).gradients["embed.weight"]
    assert found.is_sparse
    assert found.is_coalesced()
    assert found.indices().tolist() == [[1, 4, 8]]
    dense = copy.deepcopy(recipe.model)
    dense.embed.sparse = False
    expected = dy.steps.gradient(replace(recipe, model=dense), live.last, batch).gradients["embed.weight"]
    assert torch.allclose(found.to_dense(), expected, rtol=0, atol=1e-16)


def test_a_sparse_gradient_that_is_not_finite_is_named():
    def loss(model, batch):
        return classifier_loss(model, batch) + (model.embed(batch[0]) * 0).abs().sqrt().sum()

    recipe, live = sparse()
    with pytest.raises(NonFiniteGradient, match=r"gradient of embed\.weight for the batch at step 3"):
        dy.steps.gradient(replace(recipe, loss=loss), live.last, words(10))


def rows_of(tensor: Tensor) -> list[int]:
    assert tensor.is_coalesced()
    return tensor.indices()[0].tolist()


def table(rows: dict[int, list[float]], repeated: bool = False) -> Tensor:
    """A sparse [6, 2] tensor that stores the given rows, in halves where repeated."""
    places, values = list(rows), torch.tensor(list(rows.values()), dtype=torch.float64)
    if repeated:
        places, values = places * 2, torch.cat([values, values]) / 2
    return torch.sparse_coo_tensor(
        torch.tensor([places]), values, (6, 2), is_coalesced=not repeated, check_invariants=True
    )


BASE_ROWS = {0: [1.0, 2.0], 2: [3.0, 4.0], 3: [0.0, 6.0]}
SOURCE_ROWS = {1: [10.0, 20.0], 2: [30.0, 40.0], 4: [50.0, 60.0]}
BASE, SOURCE = table(BASE_ROWS), table(SOURCE_ROWS)


@pytest.mark.parametrize(
    ("index", "stored", "value"),
    [
        (..., [1, 2, 4], None),
        ((2,), [0, 2, 3], [[1, 2], [30, 40], [0, 6]]),
        ((0,), [2, 3], [[3, 4], [0, 6]]),  # the source does not store row 0: it is gone
        ((4,), [0, 2, 3, 4], [[1, 2], [3, 4], [0, 6], [50, 60]]),
        ((5,), [0, 2, 3], [[1, 2], [3, 4], [0, 6]]),
        ((slice(None), 1), [0, 1, 2, 3, 4], [[1, 0], [0, 20], [3, 40], [0, 0], [0, 60]]),  # 3 coasts
        ((slice(0, 3),), [1, 2, 3], [[10, 20], [30, 40], [0, 6]]),
        (torch.zeros(6, 2, dtype=torch.bool), [0, 2, 3], [[1, 2], [3, 4], [0, 6]]),
        (torch.ones(6, 2, dtype=torch.bool), [1, 2, 4], [[10, 20], [30, 40], [50, 60]]),
    ],
)
@pytest.mark.parametrize("repeated", [False, True])
def test_rows_are_stored_where_their_own_side_stores_them_by_hand(index, stored, value, repeated):
    base, source = table(BASE_ROWS, repeated), table(SOURCE_ROWS, repeated)
    before = base.to_dense(), source.to_dense()
    found = exchanged({"w": base, "v": None}, {"w": source, "v": None}, {"w": index})["w"]
    if value is None:
        assert found is source
    else:
        assert rows_of(found) == stored
        assert found.values().tolist() == value
    assert torch.equal(base.to_dense(), before[0])
    assert torch.equal(source.to_dense(), before[1])


def test_a_missing_sparse_gradient_counts_as_one_that_stores_nothing():
    none_here = exchanged({"w": None}, {"w": SOURCE}, {"w": (slice(0, 3),)})["w"]
    assert rows_of(none_here) == [1, 2]
    assert none_here.values().tolist() == [[10, 20], [30, 40]]
    none_there = exchanged({"w": BASE}, {"w": None}, {"w": (slice(0, 3),)})["w"]
    assert rows_of(none_there) == [3]
    assert exchanged({"w": BASE}, {"w": None}, {"w": ...})["w"] is None
    assert exchanged({"w": None}, {"w": None}, {"w": (0,)})["w"] is None


def test_a_sparse_gradient_exchanged_with_a_dense_one_is_dense():
    for base, source in ((BASE, SOURCE.to_dense()), (BASE.to_dense(), SOURCE)):
        found = exchanged({"w": base}, {"w": source}, {"w": (slice(None), 1)})["w"]
        expected = BASE.to_dense()
        expected[:, 1] = SOURCE.to_dense()[:, 1]
        assert not found.is_sparse
        assert torch.equal(found, expected)


def test_the_norm_of_a_sparse_gradient_is_that_of_its_sums_and_clipping_scales_it():
    for repeated in (False, True):
        g = table({0: [1.0, 2.0], 2: [3.0, -4.0]}, repeated)
        assert squared_norm(g) == 30.0
        found = clipped({"w": g, "b": torch.tensor([6.0]), "none": None}, ByNorm(1.0))
        assert found["w"].is_sparse
        assert found["none"] is None
        assert torch.allclose(found["w"].to_dense(), g.to_dense() / (66**0.5 + 1e-6), rtol=1e-15)
        assert clipped({"w": g}, ByNorm(1e6))["w"].to_dense().tolist() == g.to_dense().tolist()


@pytest.mark.parametrize("clip", [dy.ByValue(0.1), dy.ByNorm(0.1)])
def test_torchs_own_clipping_takes_no_sparse_gradients_and_by_value_neither_do_we(clip):
    recipe, live = sparse("SGD", clip)
    with pytest.raises(NotImplementedError, match="Sparse"):
        dy.steps.replay(recipe, live.last, words(10))
    pair = dy.Contrast(words(10), words(11), words(12))
    patched = sparse_pieces(recipe.model)
    if isinstance(clip, dy.ByValue):
        with pytest.raises(NotImplementedError, match="Sparse"):
            dy.patch_gradients(recipe, live.last, [pair], patched, margin)
    else:
        assert (dy.patch_gradients(recipe, live.last, [pair], patched, margin)["effect"] != 0).all()


def test_an_optimizer_that_takes_no_sparse_gradients_says_so_itself():
    recipe, _ = sparse()
    recipe = replace(recipe, optimizer=ADAMW)
    pair = dy.Contrast(words(10), words(11), words(12))
    for verb in (dy.patch_gradients, dy.patch_updates):
        with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
            verb(
                recipe,
                None,
                [pair],
                sites.parameters(recipe.model),
                margin,
            )


def test_sparseadam_moves_the_words_of_a_batch_alone_and_an_exchanged_row_with_its_moments():
    recipe, live = sparse("SparseAdam")
    base, source = torch.tensor([[0, 1, 2]]), torch.tensor([[2, 3, 4]])
    pair = dy.Contrast((base, torch.tensor([0])), (source, torch.tensor([1])), words(12))
    patched = [
        Site("3", {"embed.weight": (3,)}),
        Site("0", {"embed.weight": (0,)}),
        Site("column", {"embed.weight": (slice(None), 0)}),
    ]
    found = outcomes(dy.patch_gradients, recipe, live.last, pair, patched)
    before = live.last.parameters["embed.weight"]

    def moved(label):
        return (found[label]["embed.weight"] != before).any(1).nonzero().flatten().tolist()

    assert (moved("base"), moved("source")) == ([0, 1, 2], [2, 3, 4])
    assert (moved("3"), moved("0"), moved("column")) == ([0, 1, 2, 3], [1, 2], [0, 1, 2, 3, 4])


def test_coasting_lets_the_words_of_the_base_batch_coast_under_sparseadam():
    recipe, live = sparse("SparseAdam")
    pair = dy.Contrast(words(10), words(11), words(12))
    found = outcomes(dy.patch_gradients, recipe, live.last, pair, sites.parameters(recipe.model))
    model, optimizer = copy.deepcopy((live.model, live.optimizer))
    g = dy.steps.gradient(recipe, live.last, pair.base).gradients["embed.weight"]
    model.embed.weight.grad = g * 0.0
    optimizer.step()
    assert far({"w": found["coasted"]["embed.weight"]}, {"w": model.embed.weight}) < 1e-15


@pytest.mark.parametrize("call", ["factors", "positions"])
def test_sparse_gradients_have_factors_and_positions(call):
    recipe, live = sparse()
    pair = dy.Contrast(words(10), words(11), words(12))
    site = Site("embed", {"embed.weight": ...})
    if call == "factors":
        result = dy.patch_factors(recipe, live.last, [pair], [site], margin)
        whole = dy.patch_gradients(recipe, live.last, [pair], [site], margin)
        assert result["patched"].sel(factor="both").item() == pytest.approx(
            whole["patched"].item(), abs=1e-12
        )
    else:
        located = sites.at_positions([site], {"all": (0, 1, 2), "first": 0})
        result = dy.patch_gradients(recipe, live.last, [pair], [site, *located], margin)
        assert result["patched"].values[0, 1] == pytest.approx(result["patched"].values[0, 0], abs=1e-12)


def test_signals_go_through_a_sparse_embedding():
    recipe, live = sparse("SGD", ByNorm(0.05))
    pair = dy.Contrast(words(10), words(11), words(12))
    (site,) = sites.activations(recipe.model, "embed")
    found = outcomes(dy.patch_signals, recipe, live.last, pair, [site])[site.label]
    gradients = slow_signal(recipe, live, pair, "embed")
    assert far(found, dy.steps.step_from(recipe, live.last, gradients)) < 1e-14
