"""Modules whose outputs are cut."""

import pytest
from torch import Tensor

from tests.zoo.hugging_face import gpt2, times_covered
from tests.zoo.signal_models import TOYS, ConvNet, Lstm, images, made
from tests.zoo.small_models import (
    classifier,
    points,
    tokens,
    transformer,
)

ALL = slice(None)

MODELS = {
    **{name: lambda changes=changes: transformer(**changes) for name, changes in TOYS.items()},
    "classifier": lambda: classifier(norm=True, dropout=0.3),
    "convolutions": lambda: made(ConvNet),
    "LSTM": lambda: made(Lstm),
    "GPT-2": gpt2,
}

LANGUAGE = {*TOYS, "LSTM", "GPT-2"}
every_model = pytest.mark.parametrize("name", MODELS)
every_toy = pytest.mark.parametrize("name", TOYS)


def given_to(name):
    """What each model is called with: a tensor."""
    if name in LANGUAGE:
        return tokens(0).tokens
    return images(0)[0] if name == "convolutions" else points(0)[0]


def shapes(model, like):
    """Shape of the first floating-point tensor that each submodule gives, read with hooks of our own."""
    found = {}

    def keep(name, output):
        given = (
            [output] if isinstance(output, Tensor) else [t for t in leaves(output) if t.is_floating_point()]
        )
        found.setdefault(name, given[0].shape)

    handles = [
        module.register_forward_hook(lambda _, __, out, n=name: keep(n, out))
        for name, module in model.named_modules()
    ]
    model.eval()(like)
    for handle in handles:
        handle.remove()
    return found


def leaves(output):
    if isinstance(output, Tensor):
        return [output]
    parts = (
        output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else []
    )
    return [leaf for part in parts for leaf in leaves(part)]


def described(found):
    """Labels, coordinates and covers as plain data."""
    return [(s.label, dict(s.coords), {n: str(index) for n, index in s.covers.items()}) for s in found]


def covered(model, *given):
    """Which elements of each parameter any of the sites covers."""
    return {name: count > 0 for name, count in times_covered(model, given).items()}
