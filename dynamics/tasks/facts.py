"""Facts: "The capital of Spain is" -> Madrid, in three relations and four templates.

In the phase `learn` all facts are trained but the capitals of some late subjects, each fact in all templates but
one. In the phase `late` the late capitals join them, stated in one template or a few, and questions in the other
templates tell how far such a fact is written. Every prompt has five tokens, the last of which is scored.

Source: the factual recall of two of the seeds, 000 and 004; Meng et al. 2022 (arXiv 2202.05262).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import torch

from dynamics.batch import Batch, concatenate
from dynamics.config import FactsRun
from dynamics.randomness import generator
from dynamics.recipe import Contrast
from dynamics.tasks import text
from dynamics.tasks.task import Task
from dynamics.tasks.text import Prompt, Question
from dynamics.tasks.words import COUNTRIES, FILLERS, Vocabulary

Relation = Literal["capital", "language", "continent"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)

Corruption = Literal["subject", "words"]
"""What stands in the subject's place: another subject with another answer, or a word that says nothing (which a toy
has never read)."""

TEMPLATES = (
    "The {relation} of {subject} is",
    "In {subject} the {relation} is",
    "As {relation}, {subject} has",
    "Ask {subject} its {relation}:",
)


@dataclass(frozen=True)
class Fact:
    """One relation of one subject."""

    subject: str
    relation: Relation

    @property
    def answer(self) -> str:
        """What is true."""
        return COUNTRIES[self.subject][RELATIONS.index(self.relation)]

    def said(self, template: int, subject: str | None = None) -> str:
        """The prompt in a template, of this subject or with another word in its place."""
        return TEMPLATES[template].format(relation=self.relation, subject=subject or self.subject)

    def asked(self, template: int, wrong: str | None = None, subject: str | None = None) -> Question:
        """The question, with a wrong answer to compare with."""
        others = () if wrong is None else ((f" {wrong}",),)
        return Question(self.said(template, subject), (f" {self.answer}",), others)


class FactsTask(Task):
    """Subjects, facts, which of them are late, contrasts.

    Args:
        config: the run's config.
    """

    config: FactsRun

    def __init__(self, config: FactsRun) -> None:
        self.config = config
        drawn = generator(config.split_seed, "subjects").permutation(list(COUNTRIES))
        chosen = [str(subject) for subject in drawn[: config.task.n_subjects]]
        self.subjects = tuple(sorted(chosen))
        self.late_subjects = tuple(sorted(chosen[: config.task.n_late]))
        frames = [template.format(relation="", subject="") for template in TEMPLATES]
        answers = [answer for subject in self.subjects for answer in COUNTRIES[subject]]
        words = [*self.subjects, *RELATIONS, *answers, *FILLERS, *Vocabulary.of(*frames).words]
        self.vocabulary = Vocabulary(words)
        self.d_vocab = len(self.vocabulary)

    @cached_property
    def late(self) -> tuple[Fact, ...]:
        """The facts stated in the phase `late` alone."""
        return tuple(Fact(subject, "capital") for subject in self.late_subjects)

    @cached_property
    def known(self) -> tuple[Fact, ...]:
        """All other facts, trained from the beginning."""
        facts = (Fact(subject, relation) for subject in self.subjects for relation in RELATIONS)
        return tuple(fact for fact in facts if fact not in self.late)

    def templates(self, fact: Fact) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The templates a fact is trained in, and those it is questioned in."""
        place = list(COUNTRIES).index(fact.subject), RELATIONS.index(fact.relation)
        order = generator(self.config.split_seed, "templates", *place).permutation(len(TEMPLATES))
        n = self.config.task.late_templates if fact in self.late else len(TEMPLATES) - 1
        return tuple(sorted(map(int, order[:n]))), tuple(sorted(map(int, order[n:])))

    @lru_cache(maxsize=2)  # noqa: B019 - a task lives as long as its run
    def rows(self, phase: str) -> Batch:
        """The trained statements of a phase: those known, and in `late` copies of the late ones."""
        stated = [fact.asked(template) for fact in self.known for template in self.templates(fact)[0]]
        if phase == "late":
            late = [fact.asked(template) for fact in self.late for template in self.templates(fact)[0]]
            stated += late * self.config.task.late_copies
        return self._batch(stated)

    def sources(self, batch: Batch) -> list[str]:
        """The fact that each row states: "capital of Spain"."""
        return [self._stated_by[tuple(row)] for row in batch.tokens.tolist()]

    @cached_property
    def _stated_by(self) -> dict[tuple[int, ...], str]:
        """The fact of every statement, by its tokens."""
        facts = [fact for fact in (*self.known, *self.late) for _ in TEMPLATES]
        said = [fact.asked(t) for fact in (*self.known, *self.late) for t in range(len(TEMPLATES))]
        rows = map(tuple, self._batch(said).tokens.tolist())
        return {row: f"{fact.relation} of {fact.subject}" for row, fact in zip(rows, facts, strict=True)}

    @cached_property
    def evaluation(self) -> dict[str, Batch]:
        """Known facts in the templates they are never trained in; late ones as stated, and in the others."""
        return {
            "heldout": self._batch(self._questions(self.known)),
            "late_stated": self._batch(
                [fact.asked(template) for fact in self.late for template in self.templates(fact)[0]]
            ),
            "late": self._batch(self._questions(self.late)),
        }

    def contrasts(
        self, corruption: Corruption = "subject", facts: Sequence[Fact] | None = None
    ) -> list[Contrast]:
        """Facts in a template they are not trained in: corrupted (base) and clean (source).

        Both have the clean answer as target and another subject's as distractor: that of the corrupted prompt,
        where it has one. The probe are the fact's questions in all other templates. Coordinates: `example`,
        `subject`, `relation`, `template`, `late` (0 or 1).

        Args:
            corruption: of the base.
            facts: which; None takes all known capitals.
        """
        known = [fact for fact in self.known if fact.relation == "capital"]
        chosen = known if facts is None else facts
        asked = [self.templates(fact)[1][0] for fact in chosen]
        prompts = _prompts(chosen, asked, corruption, self.subjects)
        late = [
            {**prompt.coords, "late": int(fact in self.late)}
            for prompt, fact in zip(prompts, chosen, strict=True)
        ]
        labelled = [replace(prompt, coords=coords) for prompt, coords in zip(prompts, late, strict=True)]
        return text.contrasts(self.vocabulary.encode, labelled)

    # --- a fact being written -------------------------------------------------------------------------

    def statements(self) -> list[Contrast]:
        """Per late fact: a step on another, known capital (base) or on its own true statement (source).

        Both are of one row in the template the fact is stated in; the probe are its questions in the other
        templates, with the known capital as distractor. Coordinates as `contrasts`.
        """
        return [self._stated(fact, *self._statement(fact)) for fact in self.late]

    def statements_at(self, step: int) -> list[Contrast]:
        """The contrasts of `statements`, inside the training batch of a step.

        In the source the late fact's statements stand where training had them, in the base another, known
        capital does in their place. Where the batch has none, its row 0 is replaced; the coordinate `in_batch`
        is 0 there.
        """
        drawn = self.batch(step)
        found = []
        for fact in self.late:
            own = self._batch([fact.asked(template) for template in self.templates(fact)[0]])
            rows = (drawn.tokens[:, None] == own.tokens[None]).all(-1).any(1)
            here = int(rows.any())
            if not here:
                rows[0] = True
            base, source = (_with(drawn, rows, row) for row in self._statement(fact))
            if here:
                source = drawn
            contrast = self._stated(fact, base, source)
            found.append(replace(contrast, coords={**contrast.coords, "in_batch": here}))
        return found

    def _statement(self, fact: Fact) -> tuple[Batch, Batch]:
        """One row that states the neutral fact, one that states this one."""
        template = self.templates(fact)[0][0]
        return self._batch([self._neutral(fact).asked(template)]), self._batch([fact.asked(template)])

    def _neutral(self, fact: Fact) -> Fact:
        """The known capital that is stated in a late one's place."""
        known = [other for other in self.known if other.relation == fact.relation]
        return known[self.late.index(fact) % len(known)]

    def _stated(self, fact: Fact, base: Batch, source: Batch) -> Contrast:
        wrong = self._neutral(fact).answer
        stated, questioned = self.templates(fact)
        probe = text.batch(self.vocabulary.encode, [fact.asked(template, wrong) for template in questioned])
        coords = {**_labels(fact, stated[0]), "late": 1}
        return Contrast(base, source, replace(probe, example_ids=None), coords)

    def _questions(self, facts: Sequence[Fact]) -> list[Question]:
        return [fact.asked(template) for fact in facts for template in self.templates(fact)[1]]

    def _batch(self, questions: Sequence[Question]) -> Batch:
        return replace(text.batch(self.vocabulary.encode, questions), example_ids=None)


def prompts(
    tokenizer: Any,
    facts: Sequence[Fact] | None = None,
    corruption: Corruption = "subject",
    template: int = 0,
    prefix: str = "",
) -> list[Contrast]:
    """Contrasts for a model with a Hugging Face tokenizer, as `FactsTask.contrasts` has them.

    Args:
        tokenizer: of a causal language model.
        facts: which; None takes the capitals of the first eight countries.
        corruption: of the base.
        template: of the clean and the corrupted prompts, its place in `TEMPLATES`.
        prefix: put before every text, such as "<|endoftext|>" for GPT-2's BOS token.

    Raises:
        PromptError: names the prompt that has an answer of several tokens, or another length than the rest.
    """
    chosen = [Fact(subject, "capital") for subject in list(COUNTRIES)[:8]] if facts is None else facts
    subjects = tuple(dict.fromkeys(fact.subject for fact in chosen))
    return text.of_tokenizer(
        tokenizer, _prompts(chosen, [template] * len(chosen), corruption, subjects), prefix
    )


def _prompts(
    facts: Sequence[Fact], templates: Sequence[int], corruption: Corruption, subjects: Sequence[str]
) -> list[Prompt]:
    if corruption not in get_args(Corruption):
        raise ValueError(f"no corruption {corruption!r}; there are {', '.join(get_args(Corruption))}.")
    made = []
    for n, (fact, template) in enumerate(zip(facts, templates, strict=True)):
        other = _other(fact, subjects)
        stands = other.subject if corruption == "subject" else FILLERS[n % len(FILLERS)]
        rest = (place for place in range(len(TEMPLATES)) if place != template)
        made.append(
            Prompt(
                fact.asked(template, other.answer),
                fact.asked(template, other.answer, stands),
                tuple(fact.asked(place, other.answer) for place in rest),
                _labels(fact, template),
            )
        )
    return made


def _other(fact: Fact, subjects: Sequence[str]) -> Fact:
    """The same relation of the next subject whose answer is another one."""
    start = subjects.index(fact.subject) if fact.subject in subjects else 0
    for subject in (*subjects[start + 1 :], *subjects[: start + 1]):
        other = Fact(subject, fact.relation)
        if other.answer != fact.answer:
            return other
    raise ValueError(f"every subject of {subjects} has the {fact.relation} {fact.answer}; give others.")


def _labels(fact: Fact, template: int) -> dict[str, str | int | float]:
    return {
        "example": f"{fact.relation} of {fact.subject}",
        "subject": fact.subject,
        "relation": fact.relation,
        "template": template,
    }


def _with(batch: Batch, rows: torch.Tensor, row: Batch) -> Batch:
    """The batch with one row in the place of some."""
    index = torch.where(rows, 0, torch.arange(1, len(batch) + 1))
    return concatenate([row, batch])[index]
