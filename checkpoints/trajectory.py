"""The ordered checkpoints of a run, read lazily; those of other formats are converted into one first."""

import bisect
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoints import encoding, index, shared, store, values
from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import TrajectoryError
from checkpoints.formats import foreign
from checkpoints.formats.conversion import Import, Progress
from checkpoints.formats.naming import Naming, some
from checkpoints.html import facts
from checkpoints.writer import TrajectoryWriter

logger = logging.getLogger(__name__)


class Trajectory:
    """The checkpoints of one run folder as its manifest named them when it was opened.

    Nothing but the manifest is read until a checkpoint is asked for. A file's checksum is verified the first
    time it is read. Open again to see what a writer has added since.
    """

    def __init__(self, path: Path, manifest: store.Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._entries = {entry.step: entry for entry in manifest.entries}
        self._steps = tuple(self._entries)
        self._verified: set[int] = set()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Trajectory":
        """Open a run folder.

        Raises:
            TrajectoryError: the folder holds no run, or one that this version cannot read.
        """
        path = Path(folder)
        manifest = store.read_manifest(path)
        if not manifest.sealed:
            logger.warning(
                "%s is of an older version: its config and provenance carry no checksum and are unchecked.",
                path,
            )
        return cls(path, manifest)

    @classmethod
    def from_state_dicts(
        cls,
        paths: foreign.Paths,
        out: str | os.PathLike[str],
        *,
        step: foreign.StepOf = None,
        key: str | None = None,
        prefix: str = "",
        ignore: Sequence[str] = (),
        model: nn.Module | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Progress = iter,
    ) -> "Trajectory":
        """Convert files of `torch.save(model.state_dict(), path)` into a run folder, one at a time.

        The checkpoints have no optimizer, scheduler or random number generators: a step taken from one
        begins with the recipe's optimizer, new. `provenance` says where each came from. Called again after an
        interruption, it goes on.

        Args:
            paths: files, folders (their .pt and .pth files) or globs, one or several.
            out: the run folder.
            step: the number of the batch that comes next. None reads the last integer before the extension,
                `model_step_499_.pt` is of step 499; a pattern its first group, in the last match in the path;
                or a function of the path, such as one that adds 1 where files are named by the step just taken.
            key: the entry that is the state dict, where a file holds more than that.
            prefix: taken off every name, such as `module.`; a name without it is an error.
            ignore: globs of names in the files that are left out.
            model: whose state dicts these are; it is not changed. It tells buffers from parameters, lends those
                that are not persistent, knows tied names, and its shapes are checked. Its dtypes are
                taken where they hold the files' numbers exactly, as float32 does bfloat16. Without it floating
                tensors are parameters, all others buffers.
            config: what the run can be rebuilt from, as in `TrajectoryWriter.create`.
            progress: wraps the sources where they are looked at and where they are converted, such as `tqdm`.

        Raises:
            TrajectoryError: there are no files, two of one step, some that do not fit each other or the model, or
                ones that could run code when loaded; or the folder holds anything but this import.
        """
        names = Naming(prefix, ignore, model)
        return _stored(foreign.state_dicts(paths, step, key, names, progress), out, config, progress)

    @classmethod
    def from_lightning(
        cls,
        paths: foreign.Paths,
        out: str | os.PathLike[str],
        *,
        prefix: str = "",
        ignore: Sequence[str] = (),
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Progress = iter,
    ) -> "Trajectory":
        """Convert a Lightning Trainer's .ckpt files: weights, optimizer, scheduler, and `global_step` as the step.

        A file numbers the optimizer's parameters. Their names are those that torch kept (of an optimizer made
        of `named_parameters()`), else those in `optimizer`, else, of a single group, the model's in their order.

        Args:
            optimizer: one over the parameters of `model`, grouped as in training and not stepped, such as
                `configure_optimizers()` returns; needed for several groups.

        The other arguments, and what is raised, are those of `from_state_dicts`; folders stand for their .ckpt.
        """
        names = Naming(prefix, ignore, model, optimizer)
        return _stored(foreign.lightning(paths, names, progress), out, config, progress)

    @classmethod
    def from_safetensors(
        cls,
        paths: foreign.Paths,
        out: str | os.PathLike[str],
        *,
        step: foreign.StepOf = None,
        prefix: str = "",
        ignore: Sequence[str] = (),
        model: nn.Module | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Progress = iter,
    ) -> "Trajectory":
        """Convert files of safetensors, each a whole state dict; see `from_state_dicts`."""
        names = Naming(prefix, ignore, model)
        return _stored(foreign.safetensors(paths, step, names, progress), out, config, progress)

    @classmethod
    def from_huggingface(
        cls,
        repo: str | os.PathLike[str],
        revisions: Iterable[str],
        out: str | os.PathLike[str],
        *,
        load: foreign.Load | None = None,
        step: foreign.StepOf = None,
        prefix: str = "",
        ignore: Sequence[str] = (),
        model: nn.Module | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Progress = iter,
    ) -> "Trajectory":
        """Convert revisions of a model, as suites like Pythia have them: `step0`, `step1000`.

        Args:
            repo: a folder with a sub-folder for each revision, as `save_pretrained` writes it, or the name of a
                repository on Hugging Face, whose revisions are fetched into its cache.
            revisions: names of sub-folders, branches or tags.
            load: a function of a revision's folder that gives the model in it, such as
                `AutoModelForCausalLM.from_pretrained`. Its parameters and buffers are taken as they are, so it
                decides their dtype, and draws at random what the files lack. Without it the files are read as
                they are; where a model names its tensors otherwise than its files (GPT-NeoX does, since
                transformers 5), the names are the files'.
            step: as in `from_state_dicts`, of a revision's name; None reads its last integer.

        The other arguments, and what is raised, are those of `from_state_dicts`.
        """
        names = Naming(prefix, ignore, model)
        found = foreign.huggingface(repo, revisions, step, names, load, progress)
        return _stored(found, out, config, progress)

    @classmethod
    def from_trainer(
        cls,
        folder: str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        load: foreign.Load | None = None,
        prefix: str = "",
        ignore: Sequence[str] = (),
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Progress = iter,
    ) -> "Trajectory":
        """Convert a Hugging Face Trainer's `checkpoint-500` folders: weights, optimizer, scheduler, random numbers.

        A step is the number in a folder's name. Without the files beside the weights (`save_only_model`) there are
        weights alone. With `recipe = dy.Recipe.from_trainer(trainer)`, `model` is its model and `optimizer` what
        `recipe.build_optimizer(model.parameters())` makes.

        Args:
            folder: the Trainer's `output_dir`.
            load: as in `from_huggingface`, such as `type(model).from_pretrained`: needed where a model names its
                tensors otherwise than its files, as GPT-NeoX does.
            optimizer: over the parameters of `model`, as in `from_lightning`: the Trainer's has two groups.

        The other arguments, and what is raised, are those of `from_state_dicts`.
        """
        names = Naming(prefix, ignore, model, optimizer)
        return _stored(foreign.trainer_folders(folder, names, load, progress), out, config, progress)

    def __repr__(self) -> str:
        span = f", steps {self._steps[0]} to {self._steps[-1]}" if self._steps else ""
        return f"Trajectory({str(self._path)!r}, {len(self)} checkpoints{span})"

    def _repr_html_(self) -> str:
        shown = [str(step) for step in self._steps]
        steps = ", ".join(shown if len(shown) < 13 else [*shown[:6], "...", *shown[-6:]])
        rows = [("folder", self._path), ("checkpoints", len(self)), ("steps", steps or "none")]
        return facts("Trajectory", [*rows, ("config", ", ".join(map(str, self.config)))])

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._path

    @property
    def steps(self) -> tuple[int, ...]:
        """The stored steps in rising order."""
        return self._steps

    @property
    def optimizer_starts(self) -> tuple[int, ...]:
        """The stored steps at which training began with a new optimizer."""
        return tuple(entry.step for entry in self._manifest.entries if entry.begins_optimizer)

    @property
    def config(self) -> dict[str, Any]:
        """The run's config (a copy)."""
        return dict(values.copied(self._manifest.config))

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the run came from: versions, commit and the like (a copy)."""
        return dict(values.copied(self._manifest.provenance))

    @property
    def last(self) -> Checkpoint:
        """The checkpoint of the highest step.

        Raises:
            TrajectoryError: there are no checkpoints, or the file is damaged.
        """
        self._check_not_empty()
        return self.at(self._steps[-1])

    def at(self, step: int) -> Checkpoint:
        """The checkpoint stored at exactly this step, its tensors on the CPU.

        Raises:
            TrajectoryError: the step is not stored (the message lists those around), or the file is damaged.
        """
        entry = self._entry(step)
        image = self._image(entry)
        checkpoint = encoding.decode(image, str(self._path / entry.file), partial(shared.read, self._path))
        if checkpoint.step != step:
            raise TrajectoryError(
                f"{self._path / entry.file} holds step {checkpoint.step}, the manifest says {step}"
            )
        return checkpoint

    def nearest(self, step: int) -> Checkpoint:
        """The stored checkpoint closest to a step; of two equally close ones the earlier.

        Raises:
            TrajectoryError: there are no checkpoints, or the file is damaged.
        """
        self._check_not_empty()
        return self.at(min(self._steps, key=lambda stored: abs(stored - step)))

    def before(self, step: int) -> Checkpoint:
        """The latest stored checkpoint at this step or before it: where a replay to `step` sets out.

        Raises:
            TrajectoryError: nothing is stored that early, or the file is damaged.
        """
        self._check_not_empty()
        i = bisect.bisect_right(self._steps, step)
        if i == 0:
            raise TrajectoryError(
                f"{str(self._path)!r} has no checkpoint at step {step} or before; "
                f"its first is {self._steps[0]}"
            )
        return self.at(self._steps[i - 1])

    def tensor(self, step: int, name: str, kind: str = "parameters") -> Tensor:
        """One tensor of one checkpoint, read without the others.

        Args:
            step: a stored step.
            name: the parameter's or buffer's name.
            kind: `parameters`, `buffers`, or what the optimizer keeps for a parameter, such as `exp_avg`.

        Raises:
            TrajectoryError: no such step or tensor (the message lists what there is), or the file is damaged.
        """
        entry = self._entry(step)
        if step not in self._verified:
            self._image(entry)
        return encoding.read_tensor(self._path / entry.file, name, kind, partial(shared.read, self._path))

    def export(self, step: int, path: str | os.PathLike[str]) -> None:
        """Write one checkpoint's parameters and buffers as a state dict, `.pt` or `.safetensors`.

        What was imported goes back as it came, without its prefix: buffers that the model lent are left out, and
        in a .pt file tied tensors have all their names (in safetensors one, as elsewhere). The optimizer is not
        written.

        Args:
            step: a stored step.
            path: a new file.

        Raises:
            TrajectoryError: the step is not stored or its file damaged, the file to write is there already,
                or its kind is unknown or cannot hold the tensors.
        """
        foreign.write_state_dict(self.at(step), Path(path), self._manifest.provenance.get("imported", {}))

    def read_file(self, name: str) -> bytes:
        """The bytes of a file beside the checkpoints, such as `metrics.csv`, its checksum verified.

        Of a file that the manifest does not list, as in runs of older versions, the log says that it is unchecked.

        Raises:
            TrajectoryError: it is missing, or is not the one that was written.
        """
        data, listed = store.read_file(self._path, name)
        if not listed:
            logger.warning("%s is not listed in the manifest and is unchecked.", self._path / name)
        return data

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files beside the checkpoints whose checksums the manifest lists."""
        listed = self._manifest.files.items()
        begun = [name for name, sums in listed if store.ABSENT in sums and not (self._path / name).exists()]
        return tuple(name for name, _ in listed if name not in begun)

    @property
    def sealed(self) -> bool:
        """Whether config and provenance carry a checksum; those of older versions do not."""
        return self._manifest.sealed

    def verify(self) -> list[str]:
        """Read every checkpoint and listed file, and say what is wrong with which; empty when all is well.

        Config, provenance and index were checked when the run was opened.
        """
        problems = shared.damaged(self._path)
        for step in self._steps:
            try:
                self.at(step)
            except TrajectoryError as error:
                problems.append(f"step {step}: {error}")
        for name in self.files:
            try:
                self.read_file(name)
            except TrajectoryError as error:
                problems.append(str(error))
        if len(unnamed := store.unnamed(self._path, self._manifest)) > 1:  # a killed writer leaves one
            problems.append(
                f"{len(unnamed)} checkpoints are there that {index.INDEX} does not name, the first "
                f"{unnamed[0]}: it has lost its end. Restore it from a copy."
            )
        return problems

    def _check_not_empty(self) -> None:
        if not self._steps:
            raise TrajectoryError(f"{str(self._path)!r} is a run without checkpoints: none was written yet")

    def _image(self, entry: index.Entry) -> bytes:
        """A checkpoint file's bytes; of one that is damaged the tensors in which it is."""
        try:
            image = store.read_checkpoint(self._path, entry)
        except TrajectoryError as error:
            if places := encoding.damaged(self._path / entry.file):
                raise TrajectoryError(f"{error} The damage is in {some(places)}.") from error
            raise
        self._verified.add(entry.step)
        return image

    def _entry(self, step: int) -> index.Entry:
        if step in self._entries:
            return self._entries[step]
        self._check_not_empty()
        i = bisect.bisect_left(self._steps, step)
        around = ", ".join(str(stored) for stored in self._steps[max(0, i - 2) : i + 2])
        raise TrajectoryError(
            f"Step {step} is not stored in {str(self._path)!r}; the nearest that are: {around}. "
            f".steps lists all {len(self)}, .nearest({step}) takes the closest."
        )


def _stored(
    found: Import, out: str | os.PathLike[str], config: Mapping[str, Any] | None, progress: Progress
) -> Trajectory:
    """The run folder with an import in it: begun, gone on with, or complete already."""
    path, plain = Path(out), dict(config or {})
    if store.holds_run(path):
        there = Trajectory.open(path)
        if not found.continues(there.provenance.get("imported")) or values.differences(there.config, plain):
            raise TrajectoryError(
                f"{str(path)!r} holds another run, or an import of other files or with other settings. Nothing was "
                "changed: choose another folder, or give the files and settings that import was begun with."
            )
        writer = TrajectoryWriter.resume(path)
    else:
        writer = TrajectoryWriter.create(path, plain, {"imported": found.provenance})
    with writer:
        for step in progress([step for step in found.checkpoints if step not in writer.steps]):
            writer.append(found.checkpoints[step]())
    return Trajectory.open(path)
