"""The command line: parse, call, print. Everything it does is a public function of the library."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

from dynamics.config import (
    ConfigError,
    Level,
    MeasureName,
    OptimizerState,
    RunConfig,
    StudyConfig,
    kind_of,
)

_Run = TypeVar("_Run", bound=RunConfig)

PRESETS = files("dynamics") / "presets"
SWEPT = ("patch_gradients", "patch_updates", "patch_factors", "attribute_step")
"""The verbs whose sites are parameters, which need no more than their label."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class _Parser(ArgumentParser):
    """A parser whose error for an unknown config key lists the keys that are there."""

    kind: Callable[[], RunConfig] = StudyConfig

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.search(r"(?:unrecognized arguments: --|accept option ')((?:\w+\.)*)", message)
        if unknown:
            section = unknown[1]
            valid = sorted(
                {
                    key.removeprefix(section).split(".")[0]
                    for key in _keys(self.kind())
                    if key.startswith(section)
                }
            )
            message += f"\nkeys{' of ' + section.rstrip('.') if section else ''}: {', '.join(valid)}"
        super().error(message, ex)


def _keys(config: object, prefix: str = "") -> list[str]:
    """Every key of a run's config, dotted."""
    keys = []
    for name, value in vars(config).items():
        keys += _keys(value, f"{prefix}{name}.") if is_dataclass(value) else [prefix + name]
    return keys


class _ConfigOrPreset(ActionConfigFile):
    """`--config FILE` reads a config; `--preset NAME` one that ships with the package. Later arguments win."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string == "--preset":
            if values not in _presets():
                parser.error(f"no preset {values!r}; there are {', '.join(_presets())}")
            values = str(PRESETS / f"{values}.yaml")
        super().__call__(parser, namespace, values, option_string)  # type: ignore[no-untyped-call]


def _presets() -> list[str]:
    """Names of the configs that ship with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in PRESETS.iterdir())


def _kind(arguments: Sequence[str]) -> type[RunConfig]:
    """The config class of the task that the arguments name, in `--task.name`, a config file or a preset.

    It is read before anything is parsed, as the task says which keys there are. A file that cannot be read is left
    to the parser to complain about.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--config", "--preset", "--task.name"):
        peek.add_argument(option, dest=option, action="append", nargs="?", default=[])
    given = vars(peek.parse_known_args(list(arguments))[0])
    if given["--task.name"]:
        return kind_of({"task": {"name": given["--task.name"][-1]}})
    paths = [Path(str(PRESETS / f"{name}.yaml")) for name in given["--preset"] if name in _presets()]
    for path in [*map(Path, filter(None, given["--config"])), *paths]:
        with suppress(OSError, ValueError, yaml.YAMLError):
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(data, dict) and isinstance(data.get("task"), dict) and "name" in data["task"]:
                return kind_of(data)
    return StudyConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script `dynamics`; exits with 0, 1 on an error, 130 on Ctrl-C."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        kind = _kind(words) if words[:1] == ["fit"] else StudyConfig
    except ConfigError as error:
        _complain(f"{type(error).__name__}: {error}")
        sys.exit(1)
    given = _parser(kind).parse_args(words)
    command: Callable[[Namespace], None] = _COMMANDS[given.subcommand]
    try:
        command(given[given.subcommand])
    except KeyboardInterrupt:
        _complain("Stopped. What was stored is kept; the same command goes on from there.")
        sys.exit(INTERRUPTED)
    except _user_errors() as error:
        _complain(f"{type(error).__name__}: {error}")
        sys.exit(1)


def _parser(kind: type[RunConfig] = StudyConfig) -> ArgumentParser:
    """The parser of all commands; `fit` takes the keys of one kind of run."""
    parser = _Parser(
        prog="dynamics",
        usage="dynamics {study,fit,verify,believe,compare,sweep,import,export} ...",
        description="Find where training put a behaviour: train, keep a trajectory, replay steps with one "
        "gradient exchanged, and measure what changed.",
    )
    commands = parser.add_subcommands(required=True)
    options = "--out RUN [--preset NAME] [--config FILE] [--SECTION.KEY VALUE ...] [--print_config]"
    study = _Parser(
        usage=f"dynamics study aliases {options}",
        description="Train, patch, summarise and draw: the whole study into one folder.",
    )
    study.add_argument("name", choices=["aliases"], help="which study")
    commands.add_subcommand("study", _with_config(study, StudyConfig))
    fit = _Parser(
        usage=f"dynamics fit {options}",
        description="Train alone and keep the trajectory, of the alias task or, by --preset or --task.name, of "
        "another; `dynamics fit --preset NAME --help` shows that task's keys.",
    )
    commands.add_subcommand("fit", _with_config(fit, kind))
    verify = _Parser(
        usage="dynamics verify RUN",
        description="Check every file of a run and replay every stored neighbour, bit by bit.",
    )
    verify.add_argument("run", type=Path, help="the run's folder")
    commands.add_subcommand("verify", verify)
    believe = _Parser(
        usage="dynamics believe RUN [RUN ...] --site LABEL [--x2_step N] [--optimizer fresh|stored] [--impulse N]",
        description="Ten checks of whether a site is where reliable data changes behaviour.",
    )
    believe.add_argument(
        "runs", type=Path, nargs="+", help="folders of runs; of several, the run is the unit"
    )
    believe.add_argument(
        "--site", type=str, required=True, help='a label such as "attn 0", "L0H2", "W_V L0H1"'
    )
    believe.add_argument("--x2_step", type=int, default=10, help="the step within X2 that is replayed")
    believe.add_argument("--optimizer", choices=["fresh", "stored"], default="fresh")
    believe.add_argument("--impulse", type=int, default=30, help="steps trained on after the definition")
    commands.add_subcommand("believe", believe)
    commands.add_subcommand("compare", _compare_parser())
    commands.add_subcommand("sweep", _sweep_parser())
    imported = _Parser(
        usage="dynamics import state_dicts|lightning|safetensors PATH [PATH ...] --out RUN [--prefix P] "
        "[--step PATTERN] [--key NAME] [--ignore GLOB ...]\n"
        "       dynamics import huggingface FOLDER_OR_REPO REVISION [REVISION ...] --out RUN [...]",
        description="Convert checkpoints of another format into a run's folder.",
    )
    imported.add_argument("kind", choices=["state_dicts", "lightning", "safetensors", "huggingface"])
    imported.add_argument("paths", type=str, nargs="+", help="files, folders, globs; repository, revisions")
    imported.add_argument("--out", type=Path, required=True, help="the run's folder; a second call goes on")
    imported.add_argument("--prefix", type=str, default="", help="taken off every name, such as model.")
    imported.add_argument("--step", type=str, help="a pattern whose first group is the step in a path")
    imported.add_argument("--key", type=str, help="the entry of a file that is the state dict")
    imported.add_argument("--ignore", type=str, nargs="+", default=[], help="globs of names to leave out")
    commands.add_subcommand("import", imported)
    export = _Parser(
        usage="dynamics export RUN --step N --to FILE.safetensors|FILE.pt",
        description="Write one checkpoint's parameters and buffers as a state dict.",
    )
    export.add_argument("run", type=Path, help="the run's folder")
    export.add_argument("--step", type=int, required=True, help="a stored step")
    export.add_argument("--to", type=Path, required=True, help="a new file, .safetensors or .pt")
    commands.add_subcommand("export", export)
    return parser


def _compare_parser() -> ArgumentParser:
    compare = _Parser(
        usage="dynamics compare RUN --from STEP --to STEP\n       dynamics compare RUN --every [--steps N ...]",
        description="What changed between two steps of a run, or along all of it: tables here, Datasets in "
        "RUN/results, figures in RUN/figures.",
    )
    compare.add_argument("run", type=Path, help="the run's folder")
    compare.add_argument("--from", type=int, help="a step of the run, stored or not")
    compare.add_argument("--to", type=int, help="another")
    compare.add_argument("--every", action="store_true", help="every checkpoint and its neighbour")
    compare.add_argument(
        "--steps", type=int, nargs="+", help="with --every: these; default: all that are stored"
    )
    return compare


def _sweep_parser() -> ArgumentParser:
    sweep = _Parser(
        usage="dynamics sweep RUN [RUN ...] --out FOLDER [--verb NAME] [--steps N ...] [--levels LEVEL ...]\n"
        "         [--measures NAME ...] [--optimizers stored|fresh ...] [--workers N | --scheduler ADDRESS] "
        "[--dry-run]",
        description="Replay every asked step of runs with each site exchanged, for every held-out alias. What is "
        "done is kept in FOLDER; the same command goes on from there.",
    )
    sweep.add_argument("runs", type=Path, nargs="+", help="folders of runs; several become a dim `seed`")
    sweep.add_argument("--out", type=Path, required=True, help="where results are kept; sweeps may share it")
    sweep.add_argument("--verb", choices=SWEPT, default="patch_gradients")
    sweep.add_argument(
        "--steps", type=int, nargs="+", help="steps of the run; default: all of X2 that are stored"
    )
    for name, known in (("levels", Level), ("measures", MeasureName), ("optimizers", OptimizerState)):
        sweep.add_argument(
            f"--{name}",
            choices=get_args(known),
            nargs="+",
            help=f"default: patching.{name} of the run's config",
        )
    sweep.add_argument("--workers", type=int, default=0, help="processes to start; 0 works in this one")
    sweep.add_argument("--scheduler", type=str, help="a running dask cluster: its address or scheduler file")
    sweep.add_argument(
        "--dry-run", action="store_true", help="try one unit of work, and say what all will take"
    )
    return sweep


def _with_config(parser: _Parser, kind: type[RunConfig]) -> ArgumentParser:
    parser.kind = kind
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; an unfinished run goes on")
    parser.add_argument(
        "--config",
        "--preset",
        action=_ConfigOrPreset,
        help=f"a config file (YAML), or the name of one that ships with the package: {', '.join(_presets())}",
    )
    parser.add_class_arguments(kind)
    return parser


def _config(given: Namespace, kind: type[_Run]) -> _Run:
    parts = {f.name: given[f.name] for f in fields(kind)}
    return kind.from_dict(Namespace(parts).as_dict())  # type: ignore[no-untyped-call]


def _study(given: Namespace) -> None:
    _set_threads(given.trainer.threads)
    from dynamics import studies

    report = studies.run(_config(given, StudyConfig), given.out)
    print(f"{report.table}\n\n{report.findings}\n\nEverything is in {report.folder}.")


def _fit(given: Namespace) -> None:
    _set_threads(given.trainer.threads)
    from dynamics import training

    trajectory = training.fit(_config(given, kind_of({"task": given.task.as_dict()})), given.out)
    print(
        f"{len(trajectory)} checkpoints, steps {trajectory.steps[0]} to {trajectory.steps[-1]}, in {given.out}."
    )


def _verify(given: Namespace) -> None:
    from tqdm.auto import tqdm

    from checkpoints import Trajectory
    from dynamics import studies

    trajectory = Trajectory.open(given.run)
    problems = trajectory.verify()
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(1)
    print(f"{len(trajectory)} files match their checksums.")
    if "imported" in trajectory.provenance:
        print("They were imported, so there are no batches to replay.")
        return
    _set_threads(int(trajectory.last.fingerprint["threads"]))
    for change in studies.environment_changes(trajectory.last):
        print(f"note: {change}; bits are promised only where nothing differs")
    verdicts = list(
        tqdm(studies.verify(trajectory), total=len(trajectory) - 1, desc="replaying", unit="pair", delay=5)
    )
    different = [verdict for verdict in verdicts if verdict.differences]
    for verdict in different:
        names = ", ".join(verdict.differences[:5])
        print(
            f"step {verdict.start} replayed to {verdict.stop} differs in {len(verdict.differences)}: {names}"
        )
    print(f"{len(verdicts) - len(different)} of {len(verdicts)} stored neighbours replay bit for bit.")
    if different:
        sys.exit(1)


def _believe(given: Namespace) -> None:
    from checkpoints import Trajectory, TrajectoryError
    from dynamics import studies

    trajectories = [Trajectory.open(folder) for folder in given.runs]
    for trajectory in trajectories:
        if "imported" in trajectory.provenance:
            raise TrajectoryError(
                f"{trajectory.path} was imported; the checks need a run of dynamics study or fit."
            )
    _set_threads(int(trajectories[0].last.fingerprint["threads"]))
    unit = "alias, in this run" if len(trajectories) == 1 else f"run, {len(trajectories)} of them"
    print(
        f"{given.site}, X2 step {given.x2_step}, {given.optimizer} optimizer; mean [95 % interval], unit: {unit}"
    )
    checks = studies.battery(trajectories, given.site, given.x2_step, given.optimizer, given.impulse)
    for check in checks:
        print(f"{check.verdict:>6}  {check.name}\n        {check.figure}")


def _compare(given: Namespace) -> None:
    from checkpoints import Trajectory, TrajectoryError
    from dynamics import studies

    pair = given["from"], given.to
    if (
        given.every == (None not in pair)
        or (None in pair and pair != (None, None))
        or (given.steps and not given.every)
    ):
        raise TrajectoryError("give --from STEP and --to STEP, or --every (with --steps, if not all).")
    trajectory = Trajectory.open(given.run)
    _set_threads(int(trajectory.last.fingerprint["threads"]))
    compared = (
        studies.compare_every(trajectory, given.steps)
        if given.every
        else studies.compare_pair(trajectory, *pair)
    )
    print(f"{compared.table}\n\nDatasets are in {compared.results}, figures in {compared.figures}.")


def _import(given: Namespace) -> None:
    from tqdm.auto import tqdm

    from checkpoints import Trajectory, TrajectoryError

    convert: Callable[..., Trajectory] = getattr(Trajectory, f"from_{given.kind}")
    settings = {name: given[name] for name in ("prefix", "step", "key", "ignore") if given[name]}
    for name in settings.keys() - signature(convert).parameters.keys():
        raise TrajectoryError(f"--{name} has no meaning for {given.kind}: its files say that themselves.")
    sources: tuple[Any, ...] = (given.paths,)
    if given.kind == "huggingface":
        sources = given.paths[0], given.paths[1:]
        settings["load"] = _hugging_face
    progress = partial(tqdm, desc="importing", unit="checkpoint", delay=1)
    trajectory = convert(*sources, given.out, progress=progress, **settings)
    print(
        f"{len(trajectory)} checkpoints, steps {trajectory.steps[0]} to {trajectory.steps[-1]}, in {given.out}."
    )


def _hugging_face(folder: Path) -> Any:
    """The model in a folder, of the class that its config names."""
    import transformers

    from checkpoints import TrajectoryError

    try:
        (name,) = transformers.AutoConfig.from_pretrained(folder).architectures or ("AutoModel",)
        model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise TrajectoryError(f"transformers builds no model of {folder}: {reason}") from error
    if missing := sorted(told["missing_keys"]):
        raise TrajectoryError(f"{folder} has no weights for {', '.join(missing[:5])} of {name}.")
    return model


def _export(given: Namespace) -> None:
    from checkpoints import Trajectory

    Trajectory.open(given.run).export(given.step, given.to)
    print(f"Step {given.step} of {given.run} is in {given.to}.")


def _sweep(given: Namespace) -> None:
    from checkpoints import Checkpoint, Trajectory
    from dynamics import attribution, measures, patching, results, sweeps, tasks
    from dynamics.sites import LEVELS

    runs = [Trajectory.open(folder) for folder in given.runs]
    config = tasks.aliases.load(sweeps.of_config(runs[0]).config.to_dict()).config
    levels, optimizers = (given[n] or getattr(config.patching, n) for n in ("levels", "optimizers"))
    stored = set.intersection(*(set(run.steps) for run in runs))
    x2 = range(config.phases.starts["x2"], config.phases.starts["end"])
    states = {"stored": sweeps.as_stored, "fresh": Checkpoint.with_fresh_optimizer}
    asked = sweeps.plan(
        getattr(patching, given.verb, None) or getattr(attribution, given.verb),
        runs[0] if len(runs) == 1 else runs,
        given.steps or sorted(stored & set(x2)),
        lambda task, _: task.contrasts(),
        lambda model: [site for level in levels for site in LEVELS[level](model)],
        {name: measures.by_name(name) for name in given.measures or config.patching.measures},
        {name: states[name] for name in optimizers},
    )
    if given.dry_run:
        print(sweeps.estimate(asked, given.out, given.workers))
        return
    start = time.monotonic()
    found = sweeps.run(asked, given.out, given.workers, given.scheduler)
    path = given.out / f"{asked.name}.h5"
    if not path.exists():
        results.save(found, path)
    shape = ", ".join(f"{size} {dim}" for dim, size in found.sizes.items())
    print(
        f"{path}: {shape}. It took {sweeps.duration(time.monotonic() - start)} and "
        f"{sweeps.peak_megabytes():,.0f} MB in a process."
    )


_COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "study": _study,
    "fit": _fit,
    "verify": _verify,
    "believe": _believe,
    "compare": _compare,
    "sweep": _sweep,
    "import": _import,
    "export": _export,
}


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _user_errors() -> tuple[type[Exception], ...]:
    """What is the user's to mend and is shown without a traceback; imported only once something failed."""
    from checkpoints import TrajectoryError
    from dynamics.sites import SiteError
    from dynamics.sweeps import SweepError
    from dynamics.training import NonFiniteLoss, RunError

    return ConfigError, TrajectoryError, SiteError, SweepError, NonFiniteLoss, RunError


def _complain(message: str) -> None:
    print(message, file=sys.stderr)

