"""Acronyms: "The Chief Executive Officer (" -> C, E, O, one letter after another.

A prompt has seven tokens, The C1 C2 C3 ( A1 A2, and three scored ones, so three rows of a batch. Every word is in
training; triples of words are held out.

Source: García-Carrasco et al. 2024 (arXiv 2405.04156), whose notebook is seed 003.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dynamics.batch import Batch
from dynamics.config import AcronymsRun
from dynamics.measures import LogitMeasure, logit_margin
from dynamics.randomness import generator
from dynamics.recipe import Contrast
from dynamics.tasks import text
from dynamics.tasks.task import Task
from dynamics.tasks.text import Prompt, PromptError, Question
from dynamics.tasks.words import CAPITALIZED, Vocabulary

Corruption = Literal["words", "current"]
"""What is done to a clean prompt.

words: all three words are another prompt's, and the letters so far a third's, as seed 003 shuffles them.
current: only the word whose initial comes next is another; one contrast per letter.
"""

Triple = tuple[str, str, str]

N_LETTERS = 3


class AcronymsTask(Task):
    """Words, triples of words, contrasts.

    Args:
        config: the run's config.
    """

    config: AcronymsRun

    def __init__(self, config: AcronymsRun) -> None:
        self.config = config
        n = config.task.n_words
        self.words = tuple(
            str(word)
            for initial, words in CAPITALIZED.items()
            for word in generator(config.split_seed, "words", ord(initial)).permutation(words)[:n]
        )
        self.vocabulary = Vocabulary([*self.words, *string.ascii_uppercase, "The", "("])
        self.d_vocab = len(self.vocabulary)

    @cached_property
    def triples(self) -> dict[str, tuple[Triple, ...]]:
        """`trained` triples, all different, and 256 `heldout` ones, which are none of them."""
        n_trained, n_heldout = self.config.task.n_prompts, 256
        draw = generator(self.config.split_seed, "triples")
        found: dict[Triple, None] = {}
        while len(found) < n_trained + n_heldout:
            a, b, c = (self.words[i] for i in draw.integers(len(self.words), size=N_LETTERS))
            found[a, b, c] = None
        drawn = tuple(found)
        return {"heldout": drawn[:n_heldout], "trained": drawn[n_heldout:]}

    @lru_cache(maxsize=1)  # noqa: B019 - a task lives as long as its run
    def rows(self, phase: str) -> Batch:
        """Three rows for each trained triple."""
        return self._batch(self.triples["trained"])

    def sources(self, batch: Batch) -> list[str]:
        """Which letter each row asks for: "letter 1" to "letter 3"."""
        first = len(self.vocabulary.encode(f"The {' '.join(self.triples['trained'][0])} (")) - 1
        return [f"letter {place - first + 1}" for place in batch.target_pos.tolist()]

    @cached_property
    def evaluation(self) -> dict[str, Batch]:
        """256 held-out triples, and as many trained ones."""
        return {name: self._batch(triples[:256]) for name, triples in self.triples.items()}

    def contrasts(self, corruption: Corruption = "words", n: int = 64) -> list[Contrast]:
        """Held-out prompts, corrupted (base) and clean (source), with the clean letters as targets.

        Distractors are the other 25 capitals: `measures.logit_margin` is the letter less the best of them. Of
        `words` there is a contrast for each prompt with a row for each letter (`by_letter` tells them apart), of
        `current` one for each letter. The probe has the same words in other places. Coordinates: `example`,
        `acronym`, `letter` (1 to 3; 0 for all).
        """
        return text.contrasts(
            self.vocabulary.encode, _prompts(self.triples["heldout"][:n], corruption, self.words)
        )

    def _batch(self, triples: Sequence[Triple]) -> Batch:
        questions = [replace(_asked(triple), wrong=()) for triple in triples]
        return replace(text.batch(self.vocabulary.encode, questions), example_ids=None)


def by_letter(measure: LogitMeasure = logit_margin) -> dict[str, LogitMeasure]:
    """A measure of each letter alone, for batches that have three rows for each prompt.

    A letter's own rows count threefold and the others' are zero, so that the mean over all rows is the letter's.
    """

    def of(place: int) -> LogitMeasure:
        def from_logits(logits: Tensor, batch: Batch) -> Tensor:
            own = torch.arange(len(batch), device=logits.device) % N_LETTERS == place
            return torch.where(own, N_LETTERS * measure.from_logits(logits, batch), 0.0)

        return LogitMeasure(f"letter {place + 1}", measure.units, from_logits)

    return {found.name: found for found in map(of, range(N_LETTERS))}


def read(path: str | Path) -> list[Triple]:
    """The triples of a text file with a line `prompt, acronym` for each, as seed 003 has it.

    A prompt is `The C1 C2 C3 (`, with or without letters after it.

    Raises:
        PromptError: names a line that is not so, or whose acronym is not its words' initials.
    """
    triples: list[Triple] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        prompt, _, acronym = (part.strip() for part in line.rpartition(","))
        words = prompt.partition("(")[0].split()[1:]
        if len(words) != N_LETTERS or "(" not in prompt or "".join(w[0] for w in words) != acronym:
            raise PromptError(
                f"{path}, line {number}: {line!r} is not of the form 'The Chief Executive Officer (, CEO': an "
                "article, three words, an open bracket, a comma, the words' initials."
            )
        triples.append((words[0], words[1], words[2]))
    return triples


def prompts(
    tokenizer: Any,
    triples: Sequence[Triple] | None = None,
    corruption: Corruption = "words",
    prefix: str = "",
    seed: int = 0,
) -> list[Contrast]:
    """Contrasts for a model with a Hugging Face tokenizer, as `AcronymsTask.contrasts` has them.

    Args:
        tokenizer: of a causal language model; a letter alone must be one token.
        triples: such as `read` has them; None draws eight.
        corruption: of the base.
        prefix: put before every text, such as "<|endoftext|>" for GPT-2's BOS token.
        seed: draws them.

    Raises:
        PromptError: names the prompt that has another length than the rest.
    """
    words = [word for words in CAPITALIZED.values() for word in words]
    if triples is None:
        drawn = generator(seed, "text prompts").permutation(words)[: 8 * N_LETTERS]
        triples = [(str(a), str(b), str(c)) for a, b, c in drawn.reshape(-1, N_LETTERS)]
    return text.of_tokenizer(tokenizer, _prompts(triples, corruption, words), prefix)


def _letters(triple: Triple) -> tuple[str, ...]:
    return tuple(word[0] for word in triple)


def _asked(
    triple: Triple,
    clean: Triple | None = None,
    shown: Triple | None = None,
    scored: tuple[int, ...] | None = None,
) -> Question:
    """A triple's question with the clean triple's answers, and the letters so far of `shown`."""
    answers = _letters(clean or triple)
    others = tuple(tuple(c for c in string.ascii_uppercase if c != letter) for letter in answers)
    said = None if shown is None else _letters(shown)[:-1]
    return Question(f"The {' '.join(triple)} (", answers, others, said, scored)


def _prompts(triples: Sequence[Triple], corruption: Corruption, words: Sequence[str]) -> list[Prompt]:
    if corruption not in get_args(Corruption):
        raise ValueError(f"no corruption {corruption!r}; there are {', '.join(get_args(Corruption))}.")
    if corruption == "words" and len(triples) < 3:
        raise ValueError(f"{len(triples)} prompts: their words are exchanged among them, which takes three.")
    made = []
    for n, triple in enumerate(triples):
        example = f"{' '.join(triple)} {n}"
        acronym = "".join(_letters(triple))
        if corruption == "words":
            other, third = (triples[(n + shift) % len(triples)] for shift in (1, 2))
            made.append(
                Prompt(
                    _asked(triple),
                    _asked(other, clean=triple, shown=third),
                    _elsewhere(triple),
                    {"example": example, "acronym": acronym, "letter": 0},
                )
            )
        else:
            made += [
                Prompt(
                    _asked(triple, scored=(place,)),
                    _asked(_replaced(triple, place, words, n), clean=triple, scored=(place,)),
                    _elsewhere(triple),
                    {"example": f"{example} letter {place + 1}", "acronym": acronym, "letter": place + 1},
                )
                for place in range(N_LETTERS)
            ]
    return made


def _replaced(triple: Triple, place: int, words: Sequence[str], n: int) -> Triple:
    """The triple with another word at one place, of another initial; which one, the count says."""
    others = [word for word in words if word[0] != triple[place][0]]
    changed = list(triple)
    changed[place] = others[(7 * n + place) % len(others)]
    return changed[0], changed[1], changed[2]


def _elsewhere(triple: Triple) -> tuple[Question, ...]:
    """The same words, each in both other places."""
    a, b, c = triple
    return _asked((b, c, a)), _asked((c, a, b))
