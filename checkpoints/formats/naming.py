"""From the names in a file to a model's: parameters and buffers told apart, ties found, optimizers mapped.

A state dict mixes parameters with buffers, may name a tied parameter twice, and leaves out the buffers that
are not persistent. A model knows all three, so it is asked where there is one. Without, floating tensors are
parameters and all others buffers, and of several names for the same memory the first stays, as in
`named_parameters()`. That is right for every model whose buffers are neither floating nor left out; where it
is not, whatever restores the checkpoint says so.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoints import values
from checkpoints.errors import TrajectoryError
from checkpoints.optimizer import OptimizerState, capture_optimizer
from checkpoints.wrappers import own_name

_PARALLEL = "module."
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum")


@dataclass(frozen=True)
class Naming:
    """How the names in a file become a model's.

    Attributes:
        prefix: taken off every name. Without one, what `torch.compile` and DistributedDataParallel put before all
            names (`_orig_mod.`, `module.`) is taken off.
        ignore: globs of names, as they stand in the file, that are left out.
        model: whose parameters and buffers these are, where it is known.
        optimizer: over the model's parameters, grouped as in training, where it is known.
    """

    prefix: str = ""
    ignore: Sequence[str] = ()
    model: nn.Module | None = None
    optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        if isinstance(self.ignore, str):
            object.__setattr__(self, "ignore", (self.ignore,))
        if self.optimizer is not None and self.model is None:
            raise ValueError("optimizer= is matched to a model's parameters by identity: give model= as well")

    def own(self, names: Sequence[str]) -> dict[str, str]:
        """Names of a file -> the model's."""
        if self.prefix:
            return {name: name.removeprefix(self.prefix) for name in names}
        bare = {name: own_name(name) for name in names}
        held = () if self.model is None else (name for name, _ in self.model.named_parameters())
        if all(name.startswith(_PARALLEL) for name in bare.values()) and not any(
            name.startswith(_PARALLEL) for name in held
        ):
            bare = {name: own.removeprefix(_PARALLEL) for name, own in bare.items()}
        return bare


@dataclass(frozen=True)
class Split:
    """A state dict told apart.

    Attributes:
        tied: another name of a tensor -> the name that stays.
        lent: buffers that no file holds, taken from the model.
        left_out: names in the file that are in neither.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    tied: dict[str, str]
    lent: list[str]
    left_out: list[str]


def split(contents: Mapping[str, Any], naming: Naming) -> Split:
    """The parameters and buffers in a state dict, under the model's names.

    Raises:
        TrajectoryError: something in it is no tensor, has not the prefix, or does not fit the model.
    """
    kept = {
        name: value
        for name, value in contents.items()
        if not any(fnmatchcase(name, pattern) for pattern in naming.ignore)
    }
    left_out = [name for name in contents if name not in kept]
    if others := [name for name, value in kept.items() if not isinstance(value, Tensor)]:
        raise TrajectoryError(
            f"{some(others)}: expected names -> tensors, and nothing else. If one entry is the state dict, name "
            f"it: key={others[0]!r}; ignore= leaves entries out."
        )
    if foreign := [name for name in kept if not name.startswith(naming.prefix)]:
        raise TrajectoryError(
            f"{some(foreign)} do not begin with prefix={naming.prefix!r}; the names begin with "
            f"{some(sorted({name.split('.')[0] for name in kept}))}. ignore= leaves names out."
        )
    own = naming.own(list(kept))
    tensors = {own[name]: tensor.detach() for name, tensor in kept.items()}
    if naming.model is None:
        tied = _sharing_memory(tensors)
        first = {name: tensor for name, tensor in tensors.items() if name not in tied}
        parameters = {name: t for name, t in first.items() if t.is_floating_point() or t.is_complex()}
        buffers = {name: t for name, t in first.items() if name not in parameters}
        return Split(parameters, buffers, tied, [], left_out)
    return _fitted(tensors, naming.model, left_out)


def _sharing_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Later name -> first name of tensors that are the same piece of memory."""
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            known = first.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), name)
            tied |= {name: known} if known != name else {}
    return tied


def _fitted(tensors: Mapping[str, Tensor], model: nn.Module, left_out: list[str]) -> Split:
    """Tensors in the places that a model has for them."""
    parameters = _places(model.named_parameters(remove_duplicate=False))
    buffers = _places(model.named_buffers(remove_duplicate=False))
    persistent = set(model.state_dict(keep_vars=True))
    lent = [
        names[0]
        for names, _ in buffers
        if persistent.isdisjoint(names) and not any(name in tensors for name in names)
    ]
    every = {**tensors, **{name: model.get_buffer(name).detach().cpu() for name in lent}}
    problems = [problem for place in [*parameters, *buffers] for problem in _misfits(*place, every)]
    known = {name for names, _ in [*parameters, *buffers] for name in names}
    unknown = [name for name in tensors if name not in known]
    declared = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()  # of Hugging Face's models
    harmless = [name for name in unknown if any(re.search(pattern, name) for pattern in declared)]
    if unexpected := [name for name in unknown if name not in harmless]:
        problems.append(f"the model has no {some(unexpected)} (prefix= strips, ignore= leaves out)")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise TrajectoryError(f"it does not fit the model: {'; '.join(problems[:5])}{more}.")
    return Split(
        parameters=_placed(parameters, every),
        buffers=_placed(buffers, every),
        tied={name: names[0] for names, _ in [*parameters, *buffers] for name in names[1:]},
        lent=lent,
        left_out=[*left_out, *harmless],
    )


_Place = tuple[list[str], Tensor]


def _places(named: Iterable[tuple[str, Tensor]]) -> list[_Place]:
    """Every tensor of a model with all its names, the first of which is its own."""
    found: dict[int, _Place] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _misfits(names: Sequence[str], place: Tensor, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with what a state dict holds for one place."""
    present = [name for name in names if name in tensors]
    if not present:
        return [f"{names[0]} is missing"]
    tensor = tensors[present[0]]
    if any(not values.same_bits(tensors[name], tensor) for name in present[1:]):
        return [f"{' and '.join(present)} are one tensor in the model and differ here"]
    if tensor.shape != place.shape:
        return [f"{present[0]} is {tuple(tensor.shape)}, in the model {tuple(place.shape)}"]
    if tensor.dtype != place.dtype and not values.same_bits(tensor.to(place.dtype).to(tensor.dtype), tensor):
        return [f"{present[0]} is {tensor.dtype}, which the model's {place.dtype} does not hold exactly"]
    return []


def _placed(places: Sequence[_Place], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        names[0]: tensors[next(name for name in names if name in tensors)].to(place.dtype)
        for names, place in places
    }


# --- optimizers -------------------------------------------------------------------------------------------


def optimizer_state(saved: Mapping[str, Any], found: Split, naming: Naming) -> OptimizerState:
    """An optimizer's state_dict, which numbers the parameters group by group, under their names.

    The names are those that torch kept in the groups (of an optimizer made of `named_parameters()`), else
    those of the given optimizer's groups, else, of a single group, all parameters in the model's order or
    those that require a gradient.

    Raises:
        TrajectoryError: the names cannot be told, or do not fit the state.
    """
    groups = saved["param_groups"]
    names = _names_in_groups(groups, found, naming)
    sizes = [len(group["params"]) for group in groups]
    if [len(each) for each in names] != sizes:
        raise TrajectoryError(
            f"its optimizer's groups hold {sizes} parameters, the given optimizer's {[len(n) for n in names]}."
        )
    if unknown := [name for each in names for name in each if name not in found.parameters]:
        raise TrajectoryError(
            f"its optimizer holds {some(unknown)}, which the checkpoint does not have; it has "
            f"{some(list(found.parameters))}."
        )
    name_of = {
        number: name
        for group, each in zip(groups, names, strict=True)
        for number, name in zip(group["params"], each, strict=True)
    }
    state = {name_of[number]: dict(held) for number, held in saved["state"].items()}
    for name, held in state.items():
        for moment in _MOMENTS:
            shape, expected = getattr(held.get(moment), "shape", None), found.parameters[name].shape
            if shape is not None and shape != expected:
                raise TrajectoryError(
                    f"its optimizer's {moment} for {name} is {tuple(shape)}, the parameter {tuple(expected)}: the "
                    "order is another. Give optimizer=, one over the model's parameters grouped as in training."
                )
    hyperparameters = ({k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups)
    return OptimizerState(
        tuple({"params": each, **rest} for each, rest in zip(names, hyperparameters, strict=True)), state
    )


def _names_in_groups(groups: Sequence[Mapping[str, Any]], found: Split, naming: Naming) -> list[list[str]]:
    if all("param_names" in group for group in groups):
        own = naming.own([name for group in groups for name in group["param_names"]])
        bare = [[own[name] for name in group["param_names"]] for group in groups]
        return [[found.tied.get(name, name) for name in names] for names in bare]
    if naming.optimizer is not None and naming.model is not None:
        return [group["params"] for group in capture_optimizer(naming.model, naming.optimizer).groups]
    if len(groups) == 1:
        everything = list(found.parameters)
        trained = [
            name
            for name in everything
            if naming.model is not None and naming.model.get_parameter(name).requires_grad
        ]
        for candidate in (everything, trained):
            if len(candidate) == len(groups[0]["params"]):
                return [candidate]
    raise TrajectoryError(
        f"its optimizer numbers {[len(group['params']) for group in groups]} parameters by group, and which of "
        f"the {len(found.parameters)} is which cannot be told. Give model= and optimizer=, one over the model's "
        "parameters grouped as in training; or import the weights alone, "
        "from_state_dicts(paths, out, key='state_dict')."
    )


def some(names: Sequence[str]) -> str:
    """A few names of many, for messages."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
