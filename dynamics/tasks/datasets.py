"""A task of one's own: prompts in pairs, what should follow them, and how that is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dynamics.measures import Measure
from dynamics.recipe import Contrast
from dynamics.tasks import text
from dynamics.tasks.text import Prompt, Question
from dynamics.tasks.words import Vocabulary


class PromptDataset(Protocol):
    """What a task of prompts consists of; any class that has these is one.

    class Opposites:
        measure = dy.measures.logit_difference

        def pairs(self):
            return [("hot is to cold as big is to", "hot is to cold as tall is to")]

        def target_tokens(self, pair):
            return " small", " short"

    contrasts = dy.tasks.prompt_contrasts(Opposites(), tokenizer)
    dy.patch_activations(dy.Recipe(model), None, contrasts, sites, Opposites.measure)
    """

    @property
    def measure(self) -> Measure | Mapping[str, Measure]:
        """How what follows a prompt is scored, such as `measures.logit_difference`."""

    def pairs(self) -> Sequence[tuple[str, str]]:
        """(clean, corrupted) prompts, of equal length in tokens."""

    def target_tokens(self, pair: int) -> tuple[str, str]:
        """The right token after the clean prompt of a pair and a wrong one, as text."""


def prompt_contrasts(dataset: PromptDataset, tokenizer: Any, prefix: str = "") -> list[Contrast]:
    """One contrast for each pair of a dataset: base corrupted, source clean, both scored by the clean answer.

    Coordinates: `example`, "pair 0" and so on, `clean`, `corrupted` and `answer`.

    Args:
        dataset: any `PromptDataset`.
        tokenizer: of Hugging Face, or a `Vocabulary` of whole words.
        prefix: put before every prompt, such as "<|endoftext|>" where GPT-2 is to see it first.

    Raises:
        PromptError: an answer is not one token, or prompts differ in length; it names the first that does.
    """
    prompts = []
    for i, (clean, corrupted) in enumerate(dataset.pairs()):
        right, wrong = dataset.target_tokens(i)
        coords = {"example": f"pair {i}", "clean": clean, "corrupted": corrupted, "answer": right}
        whole, broken = (Question(prompt, (right,), ((wrong,),)) for prompt in (clean, corrupted))
        prompts.append(Prompt(whole, broken, coords=coords))
    if isinstance(tokenizer, Vocabulary):
        return text.contrasts(tokenizer.encode, prompts)
    return text.of_tokenizer(tokenizer, prompts, prefix)
