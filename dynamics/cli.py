"""The command line: parse, call, print. Everything it does is a public function of the library."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

from dynamics.config import ConfigError, StudyConfig

PRESETS = files("dynamics") / "presets"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class _Parser(ArgumentParser):
    """A parser whose error for an unknown config key lists the keys that are there."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.search(r"(?:unrecognized arguments: --|accept option ')((?:\w+\.)*)", message)
        if unknown:
            section = unknown[1]
            valid = sorted(
                {key.removeprefix(section).split(".")[0] for key in _keys() if key.startswith(section)}
            )
            message += f"\nkeys{' of ' + section.rstrip('.') if section else ''}: {', '.join(valid)}"
        super().error(message, ex)


def _keys(config: object = None, prefix: str = "") -> list[str]:
    """Every key of a study's config, dotted."""
    keys = []
    for name, value in vars(StudyConfig() if config is None else config).items():
        keys += _keys(value, f"{prefix}{name}.") if is_dataclass(value) else [prefix + name]
    return keys


class _ConfigOrPreset(ActionConfigFile):
    """`--config FILE` reads a config; `--preset NAME` one that ships with the package. Later arguments win."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string == "--preset":
            names = sorted(path.name.removesuffix(".yaml") for path in PRESETS.iterdir())
            if values not in names:
                parser.error(f"no preset {values!r}; there are {', '.join(names)}")
            values = str(PRESETS / f"{values}.yaml")
        super().__call__(parser, namespace, values, option_string)  # type: ignore[no-untyped-call]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script `dynamics`; exits with 0, 1 on an error, 130 on Ctrl-C."""
    parser = _parser()
    given = parser.parse_args(None if arguments is None else list(arguments))
    command: Callable[[Namespace], None] = _COMMANDS[given.subcommand]
    try:
        command(given[given.subcommand])
    except KeyboardInterrupt:
        _complain("Stopped. What was stored is kept; the same command goes on from there.")
        sys.exit(INTERRUPTED)
    except _user_errors() as error:
        _complain(f"{type(error).__name__}: {error}")
        sys.exit(1)


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="dynamics",
        usage="dynamics {study,fit,verify,believe} ...",
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
    commands.add_subcommand("study", _with_config(study))
    fit = _Parser(usage=f"dynamics fit {options}", description="Train alone and keep the trajectory.")
    commands.add_subcommand("fit", _with_config(fit))
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
    return parser


def _with_config(parser: ArgumentParser) -> ArgumentParser:
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; an unfinished run goes on")
    parser.add_argument(
        "--config",
        "--preset",
        action=_ConfigOrPreset,
        help="a config file (YAML), or the name of one that ships with the package: default, smoke",
    )
    parser.add_class_arguments(StudyConfig)
    return parser


def _config(given: Namespace) -> StudyConfig:
    parts = {name: given[name] for name in StudyConfig.__dataclass_fields__}
    return StudyConfig.from_dict(Namespace(parts).as_dict())  # type: ignore[no-untyped-call]


def _study(given: Namespace) -> None:
    _set_threads(given.trainer.threads)
    from dynamics import studies

    report = studies.run(_config(given), given.out)
    print(f"{report.table}\n\n{report.findings}\n\nEverything is in {report.folder}.")


def _fit(given: Namespace) -> None:
    _set_threads(given.trainer.threads)
    from dynamics import training

    trajectory = training.fit(_config(given), given.out)
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
    from checkpoints import Trajectory
    from dynamics import studies

    trajectories = [Trajectory.open(folder) for folder in given.runs]
    _set_threads(int(trajectories[0].last.fingerprint["threads"]))
    unit = "alias, in this run" if len(trajectories) == 1 else f"run, {len(trajectories)} of them"
    print(
        f"{given.site}, X2 step {given.x2_step}, {given.optimizer} optimizer; mean [95 % interval], unit: {unit}"
    )
    checks = studies.battery(trajectories, given.site, given.x2_step, given.optimizer, given.impulse)
    for check in checks:
        print(f"{check.verdict:>6}  {check.name}\n        {check.figure}")


_COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "study": _study,
    "fit": _fit,
    "verify": _verify,
    "believe": _believe,
}


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _user_errors() -> tuple[type[Exception], ...]:
    """What is the user's to mend and is shown without a traceback; imported only once something failed."""
    from checkpoints import TrajectoryError
    from dynamics.sites import SiteError
    from dynamics.training import NonFiniteLoss, RunError

    return ConfigError, TrajectoryError, SiteError, NonFiniteLoss, RunError


def _complain(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
