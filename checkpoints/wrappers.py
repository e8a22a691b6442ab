"""The names that a model has by itself, under `torch.compile`, DataParallel or DistributedDataParallel."""

from torch import Tensor, nn

_COMPILED = "_orig_mod"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what was put around it as a whole."""
    while True:
        if _COMPILED in model._modules:
            model = model.get_submodule(_COMPILED)
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def own_name(name: str) -> str:
    """A name without the parts that `torch.compile` adds, of the whole model or of a submodule."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`named_parameters()` under the model's own names."""
    return {own_name(name): p for name, p in unwrapped(model).named_parameters()}


def own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """`named_buffers()` under the model's own names."""
    return {own_name(name): b for name, b in unwrapped(model).named_buffers()}


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`named_modules()` under the model's own names."""
    return {own_name(name): module for name, module in unwrapped(model).named_modules()}
