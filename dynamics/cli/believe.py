"""Ask ten checks whether a site is where training changed a behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynamics.cli.parsing import Parser
from dynamics.cli.runs import open_trained, set_threads_of
from dynamics.config import StudyConfig, read


def run(words: Sequence[str]) -> None:
    """`dynamics believe RUN [RUN ...] --site LABEL`."""
    parser = Parser(
        prog="dynamics believe",
        usage="dynamics believe RUN [RUN ...] --site LABEL [--x2-step N] [--optimizer fresh|stored] [--impulse N]\n"
        "         [--out FILE.h5]",
        description="Ten checks of whether a site is where reliable data changes behaviour; of a run of the small "
        "languages, those that do not need aliases.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of runs; of several, the run is the unit"
    )
    parser.add_argument(
        "--site",
        type=str,
        required=True,
        help='a label such as "attn 0", "L0H2", "W_V L0H1"; `dynamics show RUN --sites` lists them',
    )
    parser.add_argument(
        "--x2-step",
        "--x2_step",
        type=int,
        default=10,
        help="the step within the last phase (X2) that is replayed",
    )
    parser.add_argument("--optimizer", choices=["fresh", "stored"], default="fresh", help="its state")
    parser.add_argument("--impulse", type=int, default=30, help="steps trained on after the definition")
    parser.add_argument(
        "--out",
        type=Path,
        help="a file, .h5, to keep them in; one in RUN/results is shown by dynamics report",
    )
    given = parser.parse_args(list(words))

    from dynamics import results, studies

    trajectories = [open_trained(folder, "the checks need") for folder in given.runs]
    config = read(trajectories[0].config)
    phase = list(config.phases.by_name)[-1]
    set_threads_of(trajectories[0])
    example = "alias" if isinstance(config, StudyConfig) else "contrast"
    unit = f"{example}, in this run" if len(trajectories) == 1 else f"run, {len(trajectories)} of them"
    at = f"{phase.capitalize()} step {given.x2_step}, {given.optimizer} optimizer"
    at += f"; mean [95 % interval], unit: {unit}"
    print(f"{given.site}, {at}")
    made = []
    for check in studies.ten_checks(trajectories, given.site, given.x2_step, given.optimizer, given.impulse):
        made.append(check)
        print(f"{check.verdict:>6}  {check.name}\n        {check.figure}")
    if given.out is not None:
        results.save(studies.as_dataset(made, given.site, at), given.out)
