"""Pairs of checkpoints of small models, and measures that read a user's model and Hugging Face's alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import Checkpoint, CheckpointPair
from dynamics.batch import Batch
from dynamics.trees import Index
from tests.zoo import hugging_face
from tests.zoo.comparison_models import jittered
from tests.zoo.small_models import D_VOCAB, classifier, margin, perturbed, points, tokens, transformer


class Mixer(nn.Module):
    """An embedding, two linear layers with an MLP's bend between, and a mean over positions before the last.

    Tokens [batch, pos] -> logits [batch, pos, vocab]; `tied` reads the embedding again without calling its module.
    """

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(D_VOCAB, 6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 7)
        self.unembed = nn.Linear(7, D_VOCAB)
        self.tied = tied

    def forward(self, given: Tensor) -> Tensor:
        x = self.up(self.norm(self.embed(given))).tanh()
        logits: Tensor = self.unembed(x + x.mean(1, keepdim=True))
        return logits + self.embed.weight.sum(-1) if self.tied else logits


def mixer(tied: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return perturbed(Mixer(tied).double())


def right_logit(model: nn.Module, batch: Batch) -> Tensor:
    """The logit of each row's target, [rows]."""
    output = model(batch.tokens)
    logits = getattr(output, "logits", output)
    return logits[torch.arange(len(batch.tokens)), batch.target_pos].gather(1, batch.targets[:, None])[:, 0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "toy": transformer,
    "mixer": mixer,
    "mlp": classifier,
    "gpt2": hugging_face.gpt2,
    "llama": hugging_face.llama,
}


def batch_for(name: str, seed: int) -> Any:
    return points(seed) if name == "mlp" else tokens(seed)


def measure_for(name: str) -> Callable[[nn.Module, Any], Tensor]:
    return margin if name == "mlp" else right_logit


def pair_of(model: nn.Module, scale: float = 0.3) -> CheckpointPair:
    """Two checkpoints that differ in every element."""
    return CheckpointPair(*(jittered(Checkpoint.capture(model), 100 * n, 10 * n, scale) for n in (1, 2)))


def loaded(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """A copy of the model with a checkpoint's weights, by torch's own `load_state_dict`."""
    twin = copy.deepcopy(model)
    kept = twin.state_dict()
    given = {**checkpoint.parameters, **checkpoint.buffers}
    twin.load_state_dict(kept | {name: given[name] for name in kept.keys() & given.keys()})
    return twin.eval()


def swapped(model: nn.Module, pair: CheckpointPair, covers: Mapping[str, Index]) -> nn.Module:
    """A copy with the base's weights, and the source's where `covers` says, assigned one tensor after another."""
    twin = loaded(model, pair.base)
    tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    given = {**pair.source.parameters, **pair.source.buffers}
    with torch.no_grad():
        for name, index in covers.items():
            tensors[name][index] = given[name][index]
    return twin


def measured(model: nn.Module, batch: Any, measure: Callable[[nn.Module, Any], Tensor]) -> float:
    with torch.no_grad():
        return float(measure(model, batch).mean())
