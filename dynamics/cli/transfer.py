"""Put the parameters of one checkpoint of a run into another, site by site, over a grid of steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynamics.cli import plot
from dynamics.cli.parsing import Parser
from dynamics.cli.runs import open_trained
from dynamics.cli.sweep import add_question, question

VERBS = ("patch_parameters", "attribute_parameters")
"""The verbs of a pair of checkpoints whose sites are parameters."""


def run(words: Sequence[str]) -> None:
    """`dynamics transfer RUN --from STEP ... --into STEP ...`."""
    given = _parser().parse_args(list(words))

    from dynamics import attribution, patching, results, sweeps

    trained = open_trained(given.run, "a transfer needs")
    asked = sweeps.plan(
        getattr(patching, given.verb, None) or getattr(attribution, given.verb),
        trained,
        given.into,
        *question(given, trained),
        source_steps=given["from"],
        source_run=None if given.source is None else open_trained(given.source, "a transfer needs"),
    )
    folder = given.out or given.run / "results" / "transfer"
    found = sweeps.run(asked, folder, given.workers)
    path = folder / f"{asked.name}.h5"
    if not path.exists():
        results.save(found, path)
    shape = ", ".join(f"{size} {dim}" for dim, size in found.sizes.items())
    print(f"{path}: {shape}.")
    plot.run([str(path), "--overwrite"])


def _parser() -> Parser:
    parser = Parser(
        prog="dynamics transfer",
        usage="dynamics transfer RUN --from STEP ... --into STEP ... [--source RUN] [--verb NAME]\n"
        "         [--levels LEVEL ...] [--measures NAME ...] [--out FOLDER] [--workers N]",
        description="What does a run have at one step that it lacks at another, and where? Each site of the "
        "checkpoint at every step of --from is put into that at every step of --into; what this changes is "
        "measured on every contrast of the run's task, and drawn. Later into earlier asks what suffices, earlier "
        "into later what is necessary. What is done is kept; the same command goes on from there.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    for name, which in (("from", "gives"), ("into", "receives")):
        parser.add_argument(
            f"--{name}", type=int, nargs="+", required=True, help=f"steps of the checkpoint that {which}"
        )
    parser.add_argument(
        "--source", type=Path, metavar="RUN", help="another run that gives; default: the run itself"
    )
    parser.add_argument("--verb", choices=VERBS, default="patch_parameters", help="exchange, or integrate")
    add_question(parser)
    parser.add_argument("--out", type=Path, help="where results are kept; default: RUN/results/transfer")
    parser.add_argument("--workers", type=int, default=0, help="processes to start; 0 works in this one")
    return parser
