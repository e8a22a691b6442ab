"""Prompts as text: clean and corrupted, checked token by token, as batches and contrasts.

The same prompts serve a toy with a vocabulary of whole words and any model with a Hugging Face tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dynamics.batch import Batch
from dynamics.recipe import Contrast

Encode = Callable[[str], list[int]]
"""Text -> token ids."""


class PromptError(ValueError):
    """A prompt does not fit the tokenizer; the message names it."""


@dataclass(frozen=True)
class Question:
    """A text and the tokens that should follow it, one after another; one row of a batch for each.

    Attributes:
        text: what is read first.
        answers: what should follow; each must be one token.
        wrong: for each answer, the wrong ones to compare it with; as many for each, or none at all.
        shown: what stands after the text in place of all answers but the last; None for the answers themselves.
        scored: which answers have a row, by place; None for all.
    """

    text: str
    answers: tuple[str, ...]
    wrong: tuple[tuple[str, ...], ...] = ()
    shown: tuple[str, ...] | None = None
    scored: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """One question clean and corrupted, and questions that a training step on it is measured on.

    Attributes:
        clean, corrupted: of equal length in tokens, with the clean answers both.
        probe: other questions with the same answer; may be empty.
        coords: labels along the `example` dim.
    """

    clean: Question
    corrupted: Question
    probe: tuple[Question, ...] = ()
    coords: Mapping[str, str | int | float] = field(default_factory=dict)


def of_tokenizer(tokenizer: Any, prompts: Sequence[Prompt], prefix: str = "") -> list[Contrast]:
    """`contrasts` with a Hugging Face tokenizer, which adds no special tokens of its own.

    Args:
        tokenizer: of a causal language model.
        prompts: as text.
        prefix: put before every text, such as "<|endoftext|>" where GPT-2 is to see its BOS token first.
    """

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def begun(question: Question) -> Question:
        return replace(question, text=prefix + question.text)

    return contrasts(
        encode,
        [
            replace(p, clean=begun(p.clean), corrupted=begun(p.corrupted), probe=tuple(map(begun, p.probe)))
            for p in prompts
        ],
    )


def batch(encode: Encode, questions: Sequence[Question]) -> Batch:
    """A row for every scored answer of every question; `example_ids` count the questions.

    Raises:
        PromptError: an answer is not one token, or the questions differ in length.
    """
    rows, positions, targets, distractors, ids = [], [], [], [], []
    for n, question in enumerate(questions):
        read = encode(question.text)
        shown = question.answers[:-1] if question.shown is None else question.shown
        row = [*read, *(_single(encode, token, question) for token in shown)]
        for place in range(len(question.answers)) if question.scored is None else question.scored:
            rows.append(row)
            positions.append(len(read) - 1 + place)
            targets.append(_single(encode, question.answers[place], question))
            if question.wrong:
                distractors.append([_single(encode, token, question) for token in question.wrong[place]])
            ids.append(n)
    _check_lengths([len(row) for row in rows], [questions[n] for n in ids])
    return Batch(
        torch.tensor(rows),
        torch.tensor(positions),
        torch.tensor(targets),
        torch.tensor(distractors) if distractors else None,
        torch.tensor(ids),
    )


def contrasts(encode: Encode, prompts: Sequence[Prompt]) -> list[Contrast]:
    """Each prompt as a contrast: base corrupted, source clean, probe the other questions.

    Base and source have the clean answer as target and the wrong ones as distractors: activations are measured
    on the base itself, a training step on the probe.

    Raises:
        PromptError: an answer is not one token, or prompts differ in length; it names the first that does.
    """
    batches = [batch(encode, [prompt.corrupted]) for prompt in prompts]
    _check_lengths([found.tokens.shape[1] for found in batches], [prompt.corrupted for prompt in prompts])
    made = []
    for prompt, base in zip(prompts, batches, strict=True):
        source = batch(encode, [prompt.clean])
        _check_lengths([base.tokens.shape[1], source.tokens.shape[1]], [prompt.corrupted, prompt.clean])
        probe = batch(encode, prompt.probe) if prompt.probe else None
        made.append(Contrast(base, source, probe, prompt.coords))
    return made


def _single(encode: Encode, text: str, question: Question) -> int:
    found = encode(text)
    if len(found) != 1:
        raise PromptError(
            f"{text!r}, an answer to {question.text!r}, is {len(found)} tokens {found}; it must be one. Take "
            "another word."
        )
    return found[0]


def _check_lengths(lengths: Sequence[int], questions: Sequence[Question]) -> None:
    for length, question in zip(lengths, questions, strict=True):
        if length != lengths[0]:
            raise PromptError(
                f"{question.text!r} has {length} tokens, but {questions[0].text!r} has {lengths[0]}; clean and "
                "corrupted prompts and those beside them must be of equal length. Take words of one token each."
            )
