"""Small toy transformers whose every parameter differs from its neutral value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dynamics.config import ToyConfig
from dynamics.models.toy import ToyTransformer

D_VOCAB = 6
MICRO = {
    "n_layers": 2,
    "n_heads": 2,
    "d_model": 4,
    "d_head": 3,
    "d_mlp": 5,
    "n_ctx": 4,
    "dtype": "float64",
    "seed": 3,
}


def shaken(model: ToyTransformer) -> ToyTransformer:
    """In evaluation mode, with noise on every parameter: gains are no longer one, biases no longer zero."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
    return model.eval()


@pytest.fixture
def toy() -> Callable[..., ToyTransformer]:
    """A maker of micro models in fp64; keywords change the config."""

    def make(**changes: Any) -> ToyTransformer:
        return shaken(ToyTransformer(ToyConfig(**{**MICRO, **changes}), D_VOCAB))

    return make


@pytest.fixture
def fresh_toy() -> Callable[..., ToyTransformer]:
    """A maker of the same micro models as they are drawn."""

    def make(d_vocab: int = D_VOCAB, **changes: Any) -> ToyTransformer:
        return ToyTransformer(ToyConfig(**{**MICRO, **changes}), d_vocab)

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three rows of four tokens [batch, pos]."""
    return torch.tensor([[0, 1, 2, 3], [5, 5, 0, 4], [2, 4, 1, 1]])
