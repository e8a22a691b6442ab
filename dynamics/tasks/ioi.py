"""Indirect object identification: "When A and B went to the store , B gave a ring to" -> A.

Two names come in either order, one of them comes again and gives, and the other is the answer. Pairs of names
are held out of training. Every prompt has 14 tokens, the last of which is scored.

Source: Wang et al. 2022 (arXiv 2211.00593), and the corruptions of two of the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from dynamics.batch import Batch
from dynamics.config import IoiRun
from dynamics.randomness import generator
from dynamics.recipe import Contrast
from dynamics.tasks import text
from dynamics.tasks.task import Task
from dynamics.tasks.text import Prompt, Question
from dynamics.tasks.words import NAMES, PLACES, THINGS, Vocabulary

Corruption = Literal["subject", "order", "names"]
"""What is done to a clean prompt.

subject: the other person gives, so that the answer is the other one (seed 000's pairs of prompts).
order: the two names of the first clause change places; the answer stays what it was (seed 001).
names: two other names stand everywhere ("other names").
"""

TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "After {first} and {second} came to the {place}, {subject} gave a {thing} to",
    "While {first} and {second} worked at the {place}, {subject} sent a {thing} to",
    "At the {place}, {first} met {second}, and {subject} gave a {thing} to",
    "In the {place} with {first} and {second}, later {subject} sent a {thing} to",
)


@dataclass(frozen=True)
class Sentence:
    """What a prompt says.

    Attributes:
        template: its place in `TEMPLATES`.
        first, second: the names of the first clause, in their order.
        subject: who gives; one of the two, or a third.
        place, thing: where, and what is given.
    """

    template: int
    first: str
    second: str
    subject: str
    place: str
    thing: str

    @property
    def text(self) -> str:
        """The prompt."""
        slots = vars(self)
        return TEMPLATES[self.template].format(**slots)

    @property
    def indirect_object(self) -> str:
        """The name of the first clause that does not give: the answer."""
        return self.second if self.subject == self.first else self.first

    @property
    def order(self) -> str:
        """ABBA where the one who gives comes second in the first clause, BABA where first."""
        return "BABA" if self.subject == self.first else "ABBA"

    def asked(self, clean: Sentence | None = None) -> Question:
        """The question whose answer is the (clean) sentence's."""
        clean = clean or self
        return Question(self.text, (f" {clean.indirect_object}",), ((f" {clean.subject}",),))


class IoiTask(Task):
    """Names, pairs of names, prompts, contrasts.

    Args:
        config: the run's config.
    """

    config: IoiRun

    def __init__(self, config: IoiRun) -> None:
        self.config = config
        drawn = generator(config.split_seed, "names").permutation(NAMES)[: config.task.n_names]
        self.names = tuple(sorted(map(str, drawn)))
        frames = [
            template.format(first="", second="", subject="", place="", thing="") for template in TEMPLATES
        ]
        self.vocabulary = Vocabulary([*self.names, *PLACES, *THINGS, *Vocabulary.of(*frames).words])
        self.d_vocab = len(self.vocabulary)

    @cached_property
    def pairs(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """Unordered pairs of names, `trained` and `heldout`."""
        pairs = list(combinations(self.names, 2))
        order = generator(self.config.split_seed, "pairs").permutation(len(pairs))
        n_heldout = round(self.config.task.heldout_fraction * len(pairs))
        return {
            "heldout": tuple(pairs[i] for i in order[:n_heldout]),
            "trained": tuple(pairs[i] for i in order[n_heldout:]),
        }

    @lru_cache(maxsize=1)  # noqa: B019 - a task lives as long as its run
    def rows(self, phase: str) -> Batch:
        """The training prompts, of trained pairs."""
        return self._batch(self.sentences("trained", self.config.task.n_prompts, "prompts"))

    def sources(self, batch: Batch) -> list[str]:
        """The order of names and the template of each trained prompt: "ABBA, template 2"."""
        return [self._kinds[tuple(row)] for row in batch.tokens.tolist()]

    @cached_property
    def _kinds(self) -> dict[tuple[int, ...], str]:
        """Order and template of every trained prompt, by its tokens."""
        sentences = self.sentences("trained", self.config.task.n_prompts, "prompts")
        rows = map(tuple, self.rows("train").tokens.tolist())
        return {
            row: f"{said.order}, template {said.template}" for row, said in zip(rows, sentences, strict=True)
        }

    @cached_property
    def evaluation(self) -> dict[str, Batch]:
        """256 prompts each of held-out and of trained pairs."""
        return {name: self._batch(self.sentences(name, 256, f"evaluation {name}")) for name in self.pairs}

    def sentences(self, pairs: str, n: int, stream: str) -> list[Sentence]:
        """`n` sentences drawn from the pairs `trained` or `heldout`; equal streams give equal sentences."""
        return _draw(self.pairs[pairs], n, generator(self.config.split_seed, stream))

    def contrasts(self, corruption: Corruption = "subject", n: int = 64) -> list[Contrast]:
        """Prompts of held-out pairs, corrupted (base) and clean (source).

        Both have the clean answer as target and the one who gives as distractor, so that `logit_difference` is
        indirect object less subject. The probe are the same pair's prompts in all other templates, both orders,
        the same answer. Coordinates: `example`, `indirect_object`, `subject`, `order`, `template`.
        """
        clean = self.sentences("heldout", n, "contrasts")
        return text.contrasts(self.vocabulary.encode, _prompts(clean, corruption, self.names))

    def _batch(self, sentences: Sequence[Sentence]) -> Batch:
        questions = [replace(sentence.asked(), wrong=()) for sentence in sentences]
        return replace(text.batch(self.vocabulary.encode, questions), example_ids=None)


def prompts(
    tokenizer: Any, n: int = 8, corruption: Corruption = "subject", prefix: str = "", seed: int = 0
) -> list[Contrast]:
    """Contrasts for a model with a Hugging Face tokenizer: the prompts of `IoiTask.contrasts`, all names in use.

    Args:
        tokenizer: of a causal language model.
        n: how many.
        corruption: of the base.
        prefix: put before every text, such as "<|endoftext|>" for GPT-2's BOS token.
        seed: draws them.

    Raises:
        PromptError: names the prompt that has an answer of several tokens, or another length than the rest.
    """
    clean = _draw(tuple(combinations(NAMES, 2)), n, generator(seed, "text prompts"))
    return text.of_tokenizer(tokenizer, _prompts(clean, corruption, NAMES), prefix)


def _draw(pairs: Sequence[tuple[str, str]], n: int, draw: np.random.Generator) -> list[Sentence]:
    """Pairs in turn; template, order, place and thing drawn."""
    order = draw.permutation(len(pairs))
    found = []
    for i in range(n):
        pair = pairs[order[i % len(pairs)]]
        first, second = pair if draw.integers(2) else pair[::-1]
        subject = (first, second)[draw.integers(2)]
        template = int(draw.integers(len(TEMPLATES)))
        place, thing = (words[draw.integers(len(words))] for words in (PLACES, THINGS))
        found.append(Sentence(template, first, second, subject, place, thing))
    return found


def _prompts(sentences: Sequence[Sentence], corruption: Corruption, names: Sequence[str]) -> list[Prompt]:
    return [
        Prompt(
            sentence.asked(),
            corrupted(sentence, corruption, names, n).asked(clean=sentence),
            tuple(_elsewhere(sentence)),
            {
                "example": f"ioi {n}",
                "indirect_object": sentence.indirect_object,
                "subject": sentence.subject,
                "order": sentence.order,
                "template": sentence.template,
            },
        )
        for n, sentence in enumerate(sentences)
    ]


def corrupted(sentence: Sentence, corruption: Corruption, names: Sequence[str], n: int = 0) -> Sentence:
    """A sentence corrupted; the other names are the n-th two of those that it does not have."""
    if corruption == "subject":
        return replace(sentence, subject=sentence.indirect_object)
    if corruption == "order":
        return replace(sentence, first=sentence.second, second=sentence.first)
    if corruption == "names":
        others = [name for name in names if name not in (sentence.first, sentence.second)]
        first, second = others[2 * n % len(others)], others[(2 * n + 1) % len(others)]
        subject = first if sentence.subject == sentence.first else second
        return replace(sentence, first=first, second=second, subject=subject)
    raise ValueError(f"no corruption {corruption!r}; there are {', '.join(get_args(Corruption))}.")


def _elsewhere(sentence: Sentence) -> list[Question]:
    """The same two and the same answer in every other template, in both orders."""
    swapped = replace(sentence, first=sentence.second, second=sentence.first)
    return [
        replace(version, template=template).asked()
        for template in range(len(TEMPLATES))
        if template != sentence.template
        for version in (sentence, swapped)
    ]
