"""What the scripts that reproduce the seeds on activations share: whose activations, and where figures go."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from torch import nn

import dynamics as dy
from checkpoints import Trajectory
from dynamics.recipe import Contrast


@dataclass(frozen=True)
class Subject:
    """A trained model and its words.

    Attributes:
        model: a toy at the end of its run, or a bridge to a Hugging Face model.
        words: a tokenizer, or the toy's vocabulary.
        task: of the run; None for a Hugging Face model.
        prefix: what every prompt begins with.
    """

    model: nn.Module
    words: Any
    task: Any = None
    prefix: str = ""

    @property
    def recipe(self) -> dy.Recipe:
        """The model as it stands."""
        return dy.Recipe(self.model)

    def prompt(self, contrast: Contrast, side: str = "source") -> list[str]:
        """The tokens of a contrast's first row, one by one."""
        return [self.words.decode([int(token)]) for token in getattr(contrast, side).tokens[0]]

    def word(self, token: torch.Tensor) -> str:
        """One token as text."""
        return str(self.words.decode([int(token)])).strip()


def parser(description: str | None, run: str) -> argparse.ArgumentParser:
    """The arguments that all have: a run of this task or a Hugging Face model, and where figures go."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("run", type=Path, nargs="?", default=Path("runs") / run, help="a run's folder")
    made.add_argument("--model", help="a Hugging Face model's name or folder, instead of a run")
    made.add_argument("--out", type=Path, default=Path("runs") / "seeds", help="where figures go")
    made.add_argument("--n", type=int, default=64, help="prompts")
    return made


def trained(run: Path) -> Subject:
    """The toy of a run with its last checkpoint's weights."""
    torch.set_num_threads(1)
    recorded = Trajectory.open(run)
    task = dy.tasks.load(recorded.config)
    model = task.model()
    recorded.last.restore(model)
    return Subject(model.eval(), getattr(task, "vocabulary", None), task)


def hugging_face(name: str, bos: bool = True, processed: bool = False) -> Subject:
    """A Hugging Face model through TransformerLens's bridge.

    Args:
        name: of the hub, or a local folder.
        bos: whether prompts begin with the tokenizer's BOS token.
        processed: whether norms are folded and weights centred, as HookedTransformer had them.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name)
    made = (dy.processed_bridge if processed else dy.bridge)(model, tokenizer)
    return Subject(made, tokenizer, prefix=(tokenizer.bos_token or "") if bos else "")


def sites(subject: Subject, pattern: str, by: tuple[Any, ...], like: Any) -> list[dy.sites.Site]:
    """`sites.activations` of a subject's model at hooks blocks.*.PATTERN."""
    return dy.sites.activations(subject.model, f"blocks.*.{pattern}", by=by, like=like)


def draw(out: Path, **figures: Figure) -> None:
    """Save figures by name and say where."""
    for name, figure in figures.items():
        path = out / f"{name}.png"
        dy.plots.save(figure, path)
        print(f"figure: {path}")
