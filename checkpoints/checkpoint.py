"""One moment of a training run: everything needed to take the next step bit for bit."""

import platform
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from checkpoints import values
from checkpoints.html import facts
from checkpoints.optimizer import (
    OptimizerState,
    capture_optimizer,
    matched_groups,
    names_by_identity,
    optimizer_to,
    restore_optimizer,
)
from checkpoints.rng import RngState, as_value, replayed
from checkpoints.wrappers import own_buffers, own_modules, own_parameters


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """The state before batch `step`: plain data, shared with nothing that trains.

    Attributes:
        step: the number of the batch that comes next.
        parameters: the model's `named_parameters()`; a tied parameter once, under its first name.
        buffers: the model's `named_buffers()`, also those that are not persistent.
        optimizer: None where there was none.
        scheduler: its state_dict without functions; None where there was none.
        rng: the random number generators; None where they are unknown.
        fingerprint: the numeric environment; bits are promised only where it matches.
        begins_optimizer: training began with a new optimizer at this step, whatever came before.
        evaluating: the submodules in eval mode, by name; None where it is unknown.
        scaler: state_dict of the GradScaler; None where there was none.
        frozen: the parameters that require no gradient, by name, as far as that is known.
    """

    step: int
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: OptimizerState | None
    scheduler: dict[str, Any] | None
    rng: RngState | None
    fingerprint: dict[str, str]
    begins_optimizer: bool = False
    evaluating: tuple[str, ...] | None = None
    scaler: dict[str, Any] | None = None
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.step, int) or self.step < 0:
            raise ValueError(f"step={self.step!r}: a step is the number of a batch, an int of 0 or more")

    def __repr__(self) -> str:
        return (
            f"Checkpoint(step={self.step}, {len(self.parameters)} parameters, {len(self.buffers)} buffers, "
            f"{'an' if self.optimizer else 'no'} optimizer)"
        )

    def _repr_html_(self) -> str:
        numbers = sum(tensor.numel() for tensor in self.parameters.values())
        return facts(
            "Checkpoint",
            [
                ("step", f"{self.step} (the state before it)"),
                ("parameters", f"{len(self.parameters)} tensors, {numbers:,} numbers"),
                ("buffers", len(self.buffers)),
                ("optimizer", "stored" if self.optimizer else "none"),
                ("scheduler", "stored" if self.scheduler else "none"),
            ],
        )

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        step: int = 0,
        begins_optimizer: bool = False,
        scaler: GradScaler | None = None,
    ) -> "Checkpoint":
        """Clone everything as it stands; later training does not change the result.

        Args:
            model: its own names are used, also within `torch.compile` or DistributedDataParallel; tensors that are
                sharded over devices are gathered.
            optimizer: its parameters are matched to the model's by identity, never by position.
            scheduler: what its state_dict holds, except functions.
            step: the number of the batch that comes next.
            begins_optimizer: whether this optimizer is new at this step; pass the new one.
            scaler: of the loss, in training with float16.

        Raises:
            ValueError: the optimizer holds a parameter that the model does not have.
        """
        parameters = own_parameters(model)
        return cls(
            step=step,
            parameters=values.copied(parameters),
            buffers=values.copied(own_buffers(model)),
            optimizer=None if optimizer is None else capture_optimizer(model, optimizer),
            scheduler=None
            if scheduler is None
            else values.copied(_without_callables(scheduler.state_dict())),
            rng=RngState.capture(),
            fingerprint=_fingerprint(model),
            begins_optimizer=begins_optimizer,
            evaluating=tuple(name for name, module in own_modules(model).items() if not module.training),
            scaler=None if scaler is None else values.copied(scaler.state_dict()),
            frozen=tuple(name for name, parameter in parameters.items() if not parameter.requires_grad),
        )

    def restore(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
    ) -> None:
        """Copy this state into a model, and into its optimizer and scheduler where given.

        Parameters and buffers are overwritten in place. The optimizer's groups are matched to the recorded
        ones by the parameters they hold; its state is replaced by copies, and parameters without recorded
        state begin anew. Random number generators are left alone: see `random_state`. Nothing is changed
        unless everything fits. Modes (train or eval) are the model's own, and of a GradScaler
        `scaler.load_state_dict(checkpoint.scaler)` takes care.

        Raises:
            ValueError: names, shapes, dtypes or groups differ, or an optimizer or scheduler is given and this
                checkpoint holds none.
        """
        parameters, buffers = own_parameters(model), own_buffers(model)
        _check_fit(f"checkpoint {self.step}", "parameters", self.parameters, parameters)
        _check_fit(f"checkpoint {self.step}", "buffers", self.buffers, buffers)
        for given, recorded, kind in (
            (optimizer, self.optimizer, "optimizer"),
            (scheduler, self.scheduler, "scheduler"),
        ):
            if given is not None and recorded is None:
                raise ValueError(
                    f"Checkpoint {self.step} holds no {kind} state to restore. Restore without {kind}=, "
                    f"or capture with one: Checkpoint.capture(model, {kind}={kind})."
                )
        recorded_groups = []
        if optimizer is not None and self.optimizer is not None and self.optimizer.groups:
            recorded_groups = matched_groups(self.optimizer, optimizer, names_by_identity(model))
        with torch.no_grad():
            for name, tensor in [*parameters.items(), *buffers.items()]:
                tensor.copy_(self.parameters[name] if name in parameters else self.buffers[name])
        if optimizer is not None and self.optimizer is not None and self.optimizer.groups:
            restore_optimizer(self.optimizer, recorded_groups, optimizer, names_by_identity(model))
        if scheduler is not None and self.scheduler is not None:
            scheduler.load_state_dict(values.copied(self.scheduler))

    def with_fresh_optimizer(self) -> "Checkpoint":
        """The same checkpoint without moments and step counts; learning rate, decay and the rest stay.

        One that holds no optimizer state, as of a trajectory from elsewhere, is thereby declared to begin a new
        optimizer, as the recipe makes it.
        """
        groups = () if self.optimizer is None else values.copied(self.optimizer.groups)
        return replace(self, optimizer=OptimizerState(groups, {}))

    def with_settings(self, **settings: Any) -> "Checkpoint":
        """The same checkpoint with other settings in its optimizer's groups: "what if the rate were larger?"

        A replay takes settings from the checkpoint and not from the recipe. A scheduler sets its own rate for the
        steps after the next.

        Args:
            settings: `lr=`, `weight_decay=`, `betas=` and the like: a value for all groups, or a list of one for
                each.

        Raises:
            ValueError: there are no groups, a group has no such setting, or a list is of another length.

        >>> model = nn.Linear(2, 1)
        >>> checkpoint = Checkpoint.capture(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        >>> checkpoint.with_settings(lr=1e-2).optimizer.groups[0]["lr"]
        0.01
        """
        groups = self.optimizer.groups if self.optimizer else ()
        if not groups:
            raise ValueError(
                f"Checkpoint {self.step} holds no optimizer's groups to set {', '.join(settings)} in; the recipe's "
                "own settings are taken from it."
            )
        by_group = {}
        for name, value in settings.items():
            by_group[name] = value if isinstance(value, list) else [value] * len(groups)
            if len(by_group[name]) != len(groups):
                raise ValueError(f"{name}= lists {len(value)} values, and there are {len(groups)} groups.")
            if missing := [i for i, group in enumerate(groups) if name not in group]:
                raise ValueError(
                    f"the optimizer's group {missing[0]} has no {name!r}; it has "
                    f"{', '.join(key for key in groups[missing[0]] if key != 'params')}."
                )
        changed = tuple(
            {**group, **{name: of[i] for name, of in by_group.items()}} for i, group in enumerate(groups)
        )
        return replace(
            self, optimizer=OptimizerState(changed, self.optimizer.state if self.optimizer else {})
        )

    def to(self, device: torch.device | str) -> "Checkpoint":
        """The same checkpoint with its tensors on `device`; step counts where torch keeps them."""
        target = torch.device(device)
        return replace(
            self,
            parameters=values.moved(self.parameters, target),
            buffers=values.moved(self.buffers, target),
            optimizer=None if self.optimizer is None else optimizer_to(self.optimizer, target),
        )

    def random_state(self) -> AbstractContextManager[None]:
        """Draw from the recorded generators inside a `with`; the caller's come back on exit.

        A checkpoint without recorded generators only gives the caller's back.
        """
        return replayed(self.rng)

    def differences(self, other: "Checkpoint") -> list[str]:
        """What is not bitwise equal: names such as `parameters/embed.W_E`, `optimizer/groups/0/lr`.

        NaN equals the same NaN; a name that only one side has counts. The fingerprint is not compared, nor
        are the random number generators: see `rng_differences`.
        """
        return values.differences(self._compared(), other._compared())

    def equals(self, other: "Checkpoint") -> bool:
        """Whether `differences` finds none."""
        return not self.differences(other)

    def rng_differences(self, other: "Checkpoint") -> list[str]:
        """What of the random number generators is not bitwise equal, such as `rng/numpy/state/key`."""
        return values.differences(as_value(self.rng), as_value(other.rng), ("rng",))

    def _compared(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "begins_optimizer": self.begins_optimizer,
            "parameters": self.parameters,
            "buffers": self.buffers,
            "optimizer": self.optimizer and {"groups": self.optimizer.groups, "state": self.optimizer.state},
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }


def _without_callables(value: Any) -> Any:
    """A scheduler's state_dict without functions: the scheduler that it is loaded into keeps its own."""
    if isinstance(value, dict):
        kept = {key: _without_callables(item) for key, item in value.items() if not callable(item)}
        return Counter(kept) if isinstance(value, Counter) else kept
    return [_without_callables(item) for item in value] if isinstance(value, list) else value


def _fingerprint(model: nn.Module) -> dict[str, str]:
    """The numeric environment in which a step gives the same bits again."""
    first = next(iter(model.parameters()), torch.empty(0))
    on_cuda = first.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(first.device) if on_cuda else first.device.type,
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _some(names: list[str]) -> str:
    """A few of many names."""
    return f"{names[:5]}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_fit(owner: str, kind: str, recorded: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    if problems := misfits(owner, recorded, "the model", present):
        raise ValueError(
            f"The model's {kind} are not the recorded ones: {'; '.join(problems)}. "
            "Build the model from the run's own config (and convert its dtype after restoring)."
        )


def misfits(owner: str, ours: Mapping[str, Tensor], other: str, theirs: Mapping[str, Tensor]) -> list[str]:
    """How two sets of tensors differ in names, shapes and dtypes: a few words for each kind of difference."""
    problems = []
    if missing := [name for name in theirs if name not in ours]:
        problems.append(f"{other} has {_some(missing)}, {owner} does not")
    if unexpected := [name for name in ours if name not in theirs]:
        problems.append(f"{owner} has {_some(unexpected)}, {other} does not")
    differing = [
        f"{name} is {tuple(mine.shape)} {mine.dtype} in {owner}, {tuple(yours.shape)} {yours.dtype} in {other}"
        for name, yours in theirs.items()
        if (mine := ours.get(name)) is not None and (mine.shape, mine.dtype) != (yours.shape, yours.dtype)
    ]
    if differing:
        problems.append(differing[0] + (f", and {len(differing) - 1} more" if differing[1:] else ""))
    return problems
