"""Small models, recipes and contrasts that the engine's tests run on, and an ordinary training loop."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import dynamics as dy
from checkpoints import Checkpoint
from dynamics.batch import Batch
from dynamics.config import ToyConfig
from dynamics.models.toy import ToyTransformer
from dynamics.recipe import ByNorm, ByValue
from dynamics.sites import Site

D_VOCAB = 11

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)
"""For properties: the same examples in every run, however slow the machine."""

ADAMW = partial(AdamW, lr=0.01, weight_decay=0.1)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturbed(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """No parameter zero or one: a bias that starts at zero would hide what happens to it."""
    generator = draws(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


# --- a transformer ----------------------------------------------------------------------------------------


def transformer(dtype: str = "float64", **changes: Any) -> nn.Module:
    shapes = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_head": 4, "d_mlp": 12, "n_ctx": 4}
    config = ToyConfig(**{**shapes, "activation": "gelu", "dtype": dtype, "seed": 0, **changes})
    return perturbed(ToyTransformer(config, D_VOCAB))


def tokens(seed: int, rows: int = 6, below: int = D_VOCAB) -> Batch:
    generator = draws(seed)
    return Batch(
        tokens=torch.randint(below, (rows, 4), generator=generator),
        target_pos=torch.randint(1, 4, (rows,), generator=generator),
        targets=torch.randint(below, (rows,), generator=generator),
        distractors=torch.randint(below, (rows, 2), generator=generator),
    )


# --- a classifier that is no transformer ------------------------------------------------------------------


class Classifier(nn.Module):
    """Layers, batch normalisation and dropout where asked for, and a temperature without axes."""

    def __init__(self, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.encoder(x)).tanh())) * self.temperature


def classifier(norm: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return perturbed(Classifier(norm, dropout).to(dtype))


def points(seed: int, rows: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = draws(seed)
    x = torch.randn(rows, 5, generator=generator, dtype=dtype)
    return x, torch.randint(3, (rows,), generator=generator)


def classifier_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def margin(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Logit of the right class less the mean logit: [rows]."""
    x, y = batch
    logits = model(x)
    return logits.gather(-1, y[:, None]).squeeze(-1) - logits.mean(-1)


def spread(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Variance of the logits: a scalar."""
    return model(batch[0]).var()


def by_itself(measure: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """The measure of one model at a time, since it writes into a list: the bits of a call of one's own."""
    calls: list[None] = []

    @wraps(measure)
    def alone(model: Any, batch: Any) -> Tensor:
        calls.append(None)
        return measure(model, batch)

    return alone


# --- a model whose embedding is its unembedding -----------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(D_VOCAB, 6)
        self.mix = nn.Linear(6, 6)
        self.unembed = nn.Linear(6, D_VOCAB, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.mix(self.embed(tokens)).tanh())


def tied() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Tied().double()


# --- recipes ----------------------------------------------------------------------------------------------

CLIPS = {
    "unclipped": None,
    "by norm": ByNorm(0.1),
    "by a norm it never reaches": ByNorm(1e6),
    "by value": ByValue(0.01),
}


def two_groups(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Decay for matrices only, and another learning rate for the rest."""
    given = list(parameters)
    matrices, rest = ([p for p in given if (p.ndim > 1) == several] for several in (True, False))
    return AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0, "lr": 0.02}],
        lr=0.01,
    )


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "AdamW": ADAMW,
    "AdamW amsgrad": partial(AdamW, lr=0.01, amsgrad=True),
    "AdamW maximize": partial(AdamW, lr=0.01, weight_decay=0.1, maximize=True),
    "AdamW foreach": partial(AdamW, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW in two groups": two_groups,
    "Adam": partial(Adam, lr=0.01, betas=(0.8, 0.95)),
    "Adam decay": partial(Adam, lr=0.01, weight_decay=0.1),
    "Adam amsgrad": partial(Adam, lr=0.01, amsgrad=True),
    "SGD": partial(SGD, lr=0.1),
    "SGD momentum": partial(SGD, lr=0.1, momentum=0.9),
    "SGD dampened": partial(SGD, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "SGD nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SGD maximize": partial(SGD, lr=0.1, weight_decay=0.1, maximize=True),
}
LOOPED: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01, initial_accumulator_value=0.1),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
}


def transformer_recipe(**changes: Any) -> dy.Recipe:
    given = {"loss": dy.measures.cross_entropy, "optimizer": ADAMW, "max_grad_norm": 0.5, **changes}
    return dy.Recipe(model=given.pop("model", None) or transformer(), **given)


def classifier_recipe(**changes: Any) -> dy.Recipe:
    given = {"loss": classifier_loss, "optimizer": ADAMW, **changes}
    return dy.Recipe(model=given.pop("model", None) or classifier(), **given)


# --- ordinary training ------------------------------------------------------------------------------------


@dataclass
class Live:
    """A model in training with its optimizer and scheduler, and its state before every batch."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    checkpoints: list[Checkpoint]

    @property
    def last(self) -> Checkpoint:
        return self.checkpoints[-1]


def trained(recipe: dy.Recipe, batches: Sequence[Any], seed: int = 0) -> Live:
    """What any training loop does, on a copy of the recipe's model; the caller's generators come back."""
    model = copy.deepcopy(recipe.model)
    optimizer = recipe.optimizer(list(model.parameters()))
    scheduler = recipe.scheduler(optimizer) if recipe.scheduler else None
    live = Live(model, optimizer, scheduler, [])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step, batch in enumerate(batches):
            live.checkpoints.append(Checkpoint.capture(model, optimizer, scheduler, step))
            optimizer.zero_grad()
            recipe.loss(model, batch).backward()
            clip(recipe, model)
            optimizer.step()
            if scheduler:
                scheduler.step()
        live.checkpoints.append(Checkpoint.capture(model, optimizer, scheduler, len(batches)))
    return live


def clip(recipe: dy.Recipe, model: nn.Module) -> None:
    if isinstance(recipe.clip, ByNorm):
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip.max_norm)
    elif isinstance(recipe.clip, ByValue):
        nn.utils.clip_grad_value_(model.parameters(), recipe.clip.limit)


# --- looking inside ---------------------------------------------------------------------------------------


def outcomes(
    verb: Callable[..., Any],
    recipe: dy.Recipe,
    checkpoint: Checkpoint | None,
    contrast: dy.Contrast,
    sites: Sequence[Site],
) -> dict[str, dict[str, Tensor]]:
    """All tensors of the model that each cell of a result was measured on, by reference or site label."""
    seen: list[dict[str, Tensor]] = []

    def record(model: nn.Module, _: Any) -> Tensor:
        tensors = (*model.named_parameters(), *model.named_buffers())
        seen.append({name: tensor.detach().clone() for name, tensor in tensors})
        return torch.tensor(float(len(seen) - 1))

    result = verb(recipe, checkpoint, [contrast], sites, record)
    found = {name: seen[int(result[name].item())] for name in ("untouched", "base", "source", "coasted")}
    return found | {s.label: seen[int(result["patched"].sel(site=s.label).item())] for s in sites}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bitwise equal, name by name."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of an element, relative to the largest element."""
    assert one.keys() == other.keys()
    largest = max(float(tensor.detach().abs().max()) for tensor in one.values())
    return max(float((one[name].detach() - other[name].detach()).abs().max()) for name in one) / largest
