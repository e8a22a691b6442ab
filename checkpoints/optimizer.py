"""An optimizer's hyperparameters and moments, kept under the model's parameter names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoints import values
from checkpoints.wrappers import own_parameters


@dataclass(frozen=True, eq=False, repr=False)
class OptimizerState:
    """An optimizer's hyperparameters and moments under the model's parameter names.

    Attributes:
        groups: one dict per param_group: `params` (parameter names in the group's order) and the group's
            hyperparameters as the optimizer holds them.
        state: parameter name -> what the optimizer keeps for it (`exp_avg`, `step`, ...); parameters that
            have not been stepped are absent.
    """

    groups: tuple[dict[str, Any], ...]
    state: dict[str, dict[str, Any]]

    def __repr__(self) -> str:
        kept = dict.fromkeys(key for state in self.state.values() for key in state)
        held = f"{', '.join(map(str, kept))} of {len(self.state)} parameters" if kept else "none"
        return f"OptimizerState({_counted(_params(self))}; state: {held})"


def names_by_identity(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in own_parameters(model).items()}


def capture_optimizer(model: nn.Module, optimizer: Optimizer) -> OptimizerState:
    names = names_by_identity(model)
    groups = tuple(
        {
            "params": _names_in(group["params"], names),
            **values.copied(
                {key: value for key, value in group.items() if key not in ("params", "param_names")}
            ),
        }
        for group in optimizer.param_groups
    )
    state = {_names_in([key], names)[0]: values.copied(value) for key, value in optimizer.state.items()}
    return OptimizerState(groups, state)


def _names_in(parameters: Iterable[Tensor], names: dict[int, str]) -> list[str]:
    found = []
    for parameter in parameters:
        if id(parameter) not in names:
            shape = tuple(parameter.shape) if isinstance(parameter, Tensor) else parameter
            raise ValueError(
                f"The optimizer holds a parameter ({shape}) that the model does not have. "
                f"The model's {len(names)} parameters are matched by identity: build the optimizer from this "
                "very model's parameters, and pass the model that was trained, not a copy."
            )
        found.append(names[id(parameter)])
    return found


def matched_groups(
    recorded: OptimizerState, optimizer: Optimizer, names: dict[int, str]
) -> list[dict[str, Any]]:
    """The recorded group for each of the optimizer's groups: the one that holds the same parameters."""
    present = [_names_in(group["params"], names) for group in optimizer.param_groups]
    left = list(range(len(recorded.groups)))
    matched = []
    for i, wanted in enumerate(present):
        fitting = [j for j in left if set(recorded.groups[j]["params"]) == set(wanted)]
        if not fitting:
            raise ValueError(
                f"The optimizer has {_counted(present)}, the checkpoint {_counted(_params(recorded))}. "
                f"{_difference(i, wanted, _params(recorded))} "
                "Build the optimizer with the groups it was trained with."
            )
        matched.append(recorded.groups[fitting[0]])
        left.remove(fitting[0])
    if left:
        unmatched = _params(recorded)[left[0]]
        raise ValueError(
            f"The checkpoint has {len(recorded.groups)} parameter groups, the optimizer {len(present)}; nothing "
            f"takes its group {left[0]} of {len(unmatched)} parameters, the first {next(iter(unmatched), None)!r}. "
            "Build the optimizer with the groups it was trained with."
        )
    return matched


def _params(recorded: OptimizerState) -> list[list[str]]:
    """The names of the parameters of each recorded group."""
    return [group["params"] for group in recorded.groups]


def _counted(groups: Sequence[Sequence[str]]) -> str:
    """How many groups and parameters there are: `2 groups of 148 parameters`."""
    noun = "group" if len(groups) == 1 else "groups"
    return f"{len(groups)} {noun} of {sum(map(len, groups))} parameters"


def _difference(number: int, wanted: list[str], recorded: Sequence[list[str]]) -> str:
    """The first parameter in which a group differs from the recorded one that is most like it."""
    j, nearest = max(enumerate(recorded), key=lambda item: len(set(item[1]) & set(wanted)))
    ours, theirs = f"The optimizer's group {number} holds", f"the checkpoint's group {j}"
    for name in wanted:
        if name not in nearest:
            return f"{ours} {name!r}, which {theirs} does not."
    other = next((name for name in nearest if name not in wanted), None)
    return f"{ours} {len(wanted)} parameters; {theirs} holds {other!r} besides."


def restore_optimizer(
    recorded: OptimizerState,
    recorded_groups: list[dict[str, Any]],
    optimizer: Optimizer,
    names: dict[int, str],
) -> None:
    optimizer.state.clear()
    for group, recorded_group in zip(optimizer.param_groups, recorded_groups, strict=True):
        group.update(values.copied({key: value for key, value in recorded_group.items() if key != "params"}))
        for parameter in group["params"]:
            name = names[id(parameter)]
            if name in recorded.state:
                state = values.copied(recorded.state[name])
                optimizer.state[parameter] = _state_to(state, group, parameter.device)
            elif isinstance(optimizer, torch.optim.Adagrad):
                # The one optimizer of torch's that has state before its first step.
                new = torch.optim.Adagrad(
                    [{**group, "params": [parameter]}],
                    initial_accumulator_value=group["initial_accumulator_value"],
                )
                optimizer.state[parameter] = new.state[parameter]


def optimizer_to(optimizer: OptimizerState, device: torch.device) -> OptimizerState:
    group_of = {name: group for group in optimizer.groups for name in group["params"]}
    return replace(
        optimizer,
        state={
            name: _state_to(state, group_of.get(name, {}), device) for name, state in optimizer.state.items()
        },
    )


def _state_to(state: dict[str, Any], group: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One parameter's state on `device`; as in torch, step counts are there only if capturable or fused."""
    counts_on = device if group.get("capturable") or group.get("fused") else torch.device("cpu")
    return {key: values.moved(value, counts_on if key == "step" else device) for key, value in state.items()}
