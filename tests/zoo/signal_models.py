"""More small models, and what tests of signals and factors share: runs read by hand, gradients read off a step."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

import dynamics as dy
from checkpoints import Checkpoint
from dynamics.batch import Batch
from dynamics.sites import Site
from tests.zoo.hugging_face import gpt2, hf_loss, llama, neox
from tests.zoo.small_models import (
    D_VOCAB,
    Live,
    classifier_recipe,
    draws,
    outcomes,
    perturbed,
    points,
    tied,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)

ALL = slice(None)

# --- models -----------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two layers, a path around the second, dropout where asked for."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.gelu, dropout: float = 0.0) -> None:
        super().__init__()
        self.lower = nn.Linear(5, 8)
        self.drop = nn.Dropout(dropout)
        self.inner = nn.Linear(8, 8)
        self.upper = nn.Linear(8, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.activation(self.lower(x)))
        return self.upper(hidden + self.activation(self.inner(hidden)))


class ConvNet(nn.Module):
    """A ReLU in place after a convolution, and the same ReLU again after batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = self.relu(self.norm(self.second(x)))
        return self.head(self.pool(x).flatten(1))


class Lstm(nn.Module):
    """Tokens [batch, pos] -> logits; the LSTM gives (states, (h, c)), of which the states are read."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(D_VOCAB, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(5, D_VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


class LastState(nn.Module):
    """Reads the LSTM's last state from (h, c), not from its states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[1][0][-1])


def sequences(seed: int) -> tuple[Tensor, Tensor]:
    generator = draws(seed)
    x = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=generator)


class Odd(nn.Module):
    """A frozen embedding, a layer that runs twice, one whose output reaches no loss, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(D_VOCAB, 6)
        self.embed.weight.requires_grad_(False)
        self.twice = nn.Linear(6, 6)
        self.aside = nn.Linear(6, 6)
        self.idle = nn.Linear(6, 6)
        self.head = nn.Linear(6, D_VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        self.aside(x)
        return self.head(self.twice(self.twice(x).tanh()).tanh())


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    """In double precision, always with the same weights; the caller's generator stays where it is."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind().double()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    perturbed(model.requires_grad_(True))
    for parameter in frozen:
        parameter.requires_grad_(False)
    return model


def images(seed: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = draws(seed)
    x = torch.randn(rows, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (rows,), generator=generator)


def scored_at(batch: Batch, pos: int) -> Batch:
    """The batch with every row's loss at one position."""
    return Batch(batch.tokens, torch.full_like(batch.target_pos, pos), batch.targets, batch.distractors)


# --- recipes ----------------------------------------------------------------------------------------------

REVEALING = partial(SGD, lr=1.0)
"""The step that takes away the gradient itself, so that parameters before less after are the gradient."""

TOYS: dict[str, dict[str, Any]] = {
    "LN gelu": {},
    "RMS relu": {"normalization": "RMS", "activation": "relu"},
    "no norm": {"normalization": "none"},
    "attention only": {"attn_only": True},
}


def toy_recipe(name: str = "LN gelu", **changes: Any) -> dy.Recipe:
    return transformer_recipe(model=transformer(**TOYS[name]), **{**UNCLIPPED, **changes})


UNCLIPPED: dict[str, Any] = {"optimizer": REVEALING, "max_grad_norm": None}
LANGUAGE: dict[str, Any] = {"loss": dy.measures.cross_entropy, "optimizer": REVEALING}

RECIPES: dict[str, Callable[[], dy.Recipe]] = {
    "MLP": lambda: classifier_recipe(model=made(Mlp), optimizer=REVEALING),
    "MLP relu dropout": lambda: classifier_recipe(model=made(partial(Mlp, F.relu, 0.3)), optimizer=REVEALING),
    "convolutions": lambda: classifier_recipe(model=made(ConvNet), optimizer=REVEALING),
    "LSTM": lambda: dy.Recipe(made(Lstm), **LANGUAGE),
    "odd": lambda: dy.Recipe(made(Odd), **LANGUAGE),
    "tied": lambda: dy.Recipe(tied(), **LANGUAGE),
    **{name: partial(toy_recipe, name) for name in TOYS},
    "GPT-2": lambda: dy.Recipe(gpt2(), hf_loss, REVEALING),
    "GPT-NeoX": lambda: dy.Recipe(neox(), hf_loss, REVEALING),
    "Llama": lambda: dy.Recipe(llama(), hf_loss, REVEALING),
}
"""Every model there is, with the optimizer that reveals gradients."""

COARSE = ("GPT-2", "GPT-NeoX", "Llama")
"""Models that compute norms and softmax in single precision inside."""


def tolerance_of(name: str) -> float:
    return 1e-6 if name in COARSE else 1e-12


def batch_of(name: str, seed: int) -> Any:
    if name.startswith("MLP"):
        return points(seed)
    return images(seed) if name == "convolutions" else tokens(seed)


def contrast_of(name: str) -> dy.Contrast:
    return dy.Contrast(batch_of(name, 10), batch_of(name, 11), batch_of(name, 12))


def begun(recipe: dy.Recipe, name: str = "LN gelu") -> Live:
    """A few steps into training, so that the recipe's own model differs from the checkpoint."""
    gentle = dy.Recipe(recipe.model, recipe.loss, recipe.optimizer, clip=dy.ByNorm(0.1))
    return trained(gentle, [batch_of(name, seed) for seed in range(2)])


def zero(model: nn.Module, batch: Any) -> Tensor:
    """A measure where none is wanted."""
    return torch.zeros(())


# --- gradients read off a step ----------------------------------------------------------------------------

Gradients = dict[str, Tensor]


def less(found: Mapping[Any, dict[str, Tensor]], model: nn.Module) -> dict[Any, Gradients]:
    """The gradient that each step was taken with, where the optimizer reveals it."""
    names = [name for name, _ in model.named_parameters()]
    return {
        label: {name: found["untouched"][name] - after[name] for name in names}
        for label, after in found.items()
    }


def revealed(
    verb: Callable[..., Any],
    recipe: dy.Recipe,
    checkpoint: Checkpoint | None,
    contrast: dy.Contrast,
    sites: Sequence[Site],
) -> dict[Any, Gradients]:
    """By reference and site label, the gradient of each step."""
    return less(outcomes(verb, recipe, checkpoint, contrast, sites), recipe.model)


def factored(
    recipe: dy.Recipe, checkpoint: Checkpoint | None, contrast: dy.Contrast, sites: Sequence[Site]
) -> dict[Any, dict[str, Tensor]]:
    """All tensors that each cell of patch_factors was measured on, by reference or (site label, factor)."""
    seen: list[dict[str, Tensor]] = []

    def record(model: nn.Module, _: Any) -> Tensor:
        named = (*model.named_parameters(), *model.named_buffers())
        seen.append({name: tensor.detach().clone() for name, tensor in named})
        return torch.tensor(float(len(seen) - 1))

    result = dy.patch_factors(recipe, checkpoint, [contrast], sites, record)
    cells = {name: result[name] for name in ("untouched", "base", "source", "coasted")} | {
        (site.label, factor): result["patched"].sel(site=site.label, factor=factor)
        for site in sites
        for factor in ("x", "delta", "both")
    }
    return {label: seen[int(cell.item())] for label, cell in cells.items()}


def revealed_factors(
    recipe: dy.Recipe, checkpoint: Checkpoint | None, contrast: dy.Contrast, sites: Sequence[Site]
) -> dict[Any, Gradients]:
    """By reference and (site label, factor), the gradient of each step."""
    return less(factored(recipe, checkpoint, contrast, sites), recipe.model)


def filled(model: nn.Module, gradients: Mapping[str, Tensor | None]) -> Gradients:
    """Gradients with zero for None."""
    found = {name: gradients[name] for name, _ in model.named_parameters()}
    return {
        name: torch.zeros_like(p) if found[name] is None else found[name]
        for name, p in model.named_parameters()
    }


def patching(forward: str) -> Callable[..., Any]:
    """patch_signals with the base's or the source's activation forward."""
    return lambda *args: dy.patch_signals(*args, forward=forward)


def covering(*names: str) -> Site:
    """Parameters whole, as the site "layer"."""
    return Site("layer", dict.fromkeys(names, ...))


# --- a run read with ordinary hooks -----------------------------------------------------------------------


def first(output: Any) -> Tensor:
    """The first tensor of a module's output: of a tuple, of Hugging Face's dicts, or the output itself."""
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple) else output


def instead(output: Any, tensor: Tensor) -> Any:
    """The output with another tensor as its first."""
    if isinstance(output, Mapping):
        return type(output)(**{**output, next(iter(output)): tensor})
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable[[Tensor], Tensor]]):
    """Inside, the first tensor of each named module's output passes through a function of its own."""
    with ExitStack() as stack:
        for name, change in hooks.items():
            handle = model.get_submodule(name).register_forward_hook(
                lambda _, __, out, change=change: instead(out, change(first(out)))
            )
            stack.callback(handle.remove)
        yield


def activation(model: nn.Module, loss: Any, batch: Any, name: str) -> tuple[Tensor, Tensor]:
    """The activation with its graph, and the loss, of one ordinary run."""
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor.clone()

    with hooked(model, {name: keep}):
        value = loss(model, batch)
    return kept[0], value


def read_by_hand(
    recipe: dy.Recipe, live: Live, batch: Any, names: Iterable[str]
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Activations and their gradients at each run of each module, by `retain_grad` on a copy of the model."""
    model = copy.deepcopy(live.model)
    model.zero_grad()
    kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def keeper(name: str) -> Callable[[Tensor], Tensor]:
        def keep(activation: Tensor) -> Tensor:
            activation = (
                activation.clone() if activation.requires_grad else activation.clone().requires_grad_()
            )
            activation.retain_grad()  # of a tensor that no other module gave: an identity gives its input
            kept[name].append(activation)
            return activation.clone()  # the next module may write into it

        return keep

    with live.last.random_state(), hooked(model, {name: keeper(name) for name in kept}):
        recipe.loss(model, batch).backward()
    signals = {
        name: [torch.zeros_like(a) if a.grad is None else a.grad for a in runs] for name, runs in kept.items()
    }
    return {name: [a.detach() for a in runs] for name, runs in kept.items()}, signals


def largest(gradients: Mapping[str, Tensor]) -> float:
    return max(float(g.abs().max()) for g in gradients.values())


def off(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], scale: float | None = None) -> float:
    """Largest difference of an element, relative to the largest expected one; every name must be there."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).abs().max()) for n in expected) / (scale or largest(expected))
