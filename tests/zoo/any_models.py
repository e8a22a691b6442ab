"""Modules of every kind: tied, frozen, skipped, sparse, recurrent, with several dtypes, buffers, dropout."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import EllipsisType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site
from tests.engine.test_runs_unused import Counting, Routed
from tests.zoo.small_models import (
    ADAMW,
    LOOPED,
    OPTIMIZERS,
    Tied,
    classifier,
    classifier_loss,
    draws,
    margin,
    perturbed,
    points,
    trained,
    two_groups,
)

N_WORDS = 9


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


def sparse(optimizer: str = "SGD", clip: Any = None, steps: int = 3) -> tuple[dy.Recipe, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Words(nn.Identity(), sparse=True).double()
    recipe = dy.Recipe(model, classifier_loss, SPARSE[optimizer], clip=clip)
    return recipe, trained(replace(recipe, clip=None), [words(seed) for seed in range(steps)], seed=4)


def clip_by_norm(parameters: list[nn.Parameter], limit: float) -> None:
    """As torch's own, which takes no sparse gradients."""
    present = [p for p in parameters if p.grad is not None]
    total = sum(float(p.grad.to_dense().double().square().sum()) for p in present) ** 0.5
    for p in present:
        p.grad = p.grad * min(1.0, limit / (total + 1e-6))


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


def embedding_alone(parameters: Any) -> Any:
    """SparseAdam takes sparse gradients only; the head is left to itself."""
    return torch.optim.SparseAdam([p for p in parameters if p.shape == (N_WORDS, 4)], lr=0.05)


SPARSE = {
    "SGD": OPTIMIZERS["SGD"],
    "SGD momentum": OPTIMIZERS["SGD momentum"],
    "SparseAdam": embedding_alone,
    "Adagrad": LOOPED["Adagrad"],
}
