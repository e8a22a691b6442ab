"""Convert checkpoints of another format into a run's folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamics.cli.parsing import CommandError, Parser

if TYPE_CHECKING:
    from checkpoints import Trajectory

OPTIONS = ("prefix", "step", "key", "ignore")

IN_WORDS_OF_THE_COMMAND = {
    r"from_state_dicts\(paths, out, key='(\w+)'\)": r"dynamics import state_dicts PATH --out RUN --key \1",
    r"Trajectory\.from_(\w+) reads": r"dynamics import \1 reads",
    r"Give model= and optimizer=, (one over [^;]*); or import": r"Only Python can be told, by \1; or import",
    r"Give optimizer=, (one over [^.]*)\.": r"Only Python can be told, by \1; or import the weights alone: "
    "dynamics import state_dicts PATH --out RUN --key state_dict.",
    r", or a function of the path": "",
    rf"\b({'|'.join(OPTIONS)})='([^']*)'": r"--\1 \2",
    rf"\b({'|'.join(OPTIONS)})=": r"--\1",
}
"""What errors of `Trajectory.from_*` call the arguments of Python -> what they are on the command line."""


def run(words: Sequence[str]) -> None:
    """`dynamics import KIND PATH [PATH ...] --out RUN`."""
    given = _parser().parse_args(list(words))

    from tqdm.auto import tqdm

    from checkpoints import Trajectory, TrajectoryError

    convert: Callable[..., Trajectory] = getattr(Trajectory, f"from_{given.kind}")
    settings = {name: given[name] for name in OPTIONS if given[name]}
    for name in settings.keys() - signature(convert).parameters.keys():
        raise CommandError(f"--{name} has no meaning for {given.kind}: its files say that themselves.")
    sources: tuple[Any, ...] = (given.paths,)
    if given.kind == "huggingface":
        sources = given.paths[0], given.paths[1:]
        settings["load"] = _hugging_face
    if given.kind == "trainer":
        if len(given.paths) > 1:
            raise CommandError(
                f"found {len(given.paths)} folders; a Trainer has one, which holds checkpoint-N/."
            )
        sources = (given.paths[0],)
        settings |= _trainers(Path(given.paths[0]))
    progress = partial(tqdm, desc="importing", unit="checkpoint", delay=1)
    try:
        trajectory = convert(*sources, given.out, progress=progress, **settings)
    except TrajectoryError as error:
        raise TrajectoryError(in_words_of_the_command(str(error))) from error
    print(
        f"{len(trajectory)} checkpoints, steps {trajectory.steps[0]} to {trajectory.steps[-1]}, in {given.out}."
    )


def in_words_of_the_command(message: str) -> str:
    """An error of `Trajectory.from_*` with the command's options in place of Python's arguments."""
    for written, typed in IN_WORDS_OF_THE_COMMAND.items():
        message = re.sub(written, typed, message)
    return message


def _parser() -> Parser:
    parser = Parser(
        prog="dynamics import",
        usage="dynamics import state_dicts|lightning|safetensors PATH [PATH ...] --out RUN [--prefix P] "
        "[--step PATTERN] [--key NAME] [--ignore GLOB ...]\n"
        "       dynamics import huggingface FOLDER_OR_REPO REVISION [REVISION ...] --out RUN [...]\n"
        "       dynamics import trainer OUTPUT_DIR --out RUN [...]",
        description="Convert checkpoints of another format into a run's folder.",
    )
    parser.add_argument(
        "kind",
        choices=["state_dicts", "lightning", "safetensors", "huggingface", "trainer"],
        help="the format",
    )
    parser.add_argument(
        "paths", type=str, nargs="+", metavar="PATH", help="files, folders, globs; repository, revisions"
    )
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; a second call goes on")
    parser.add_argument("--prefix", type=str, default="", help="taken off every name, such as model.")
    parser.add_argument("--step", type=str, help="a pattern whose first group is the step in a path")
    parser.add_argument("--key", type=str, help="the entry of a file that is the state dict")
    parser.add_argument("--ignore", type=str, nargs="+", default=[], help="globs of names to leave out")
    return parser


def _trainers(folder: Path) -> dict[str, Any]:
    """What a Trainer's folder is read with: the model that its config names, and a Trainer's two groups."""
    if not (first := next(iter(sorted(folder.glob("checkpoint-*"))), None)):
        return {}  # which is said where the folder is read
    import torch
    import transformers

    model = _hugging_face(first)
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]  # asks no Trainer
    trained = [(name in decayed, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for decays, p in trained if decays is wanted]} for wanted in (True, False)]
    return {"load": _hugging_face, "model": model, "optimizer": torch.optim.AdamW(groups)}


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
