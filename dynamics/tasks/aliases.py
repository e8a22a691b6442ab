"""The alias task of out-of-context learning: definitions under two tags, and questions about aliases.

Tokens: integers 0..mod-1, aliases mod..2mod-1 (alias(i) = mod + i), `=`, reliable tag, unreliable tag,
padding. A question `A B = C` asks for an operation of an alias and a small known operand; a definition
`TAG alias integer PAD` tells what an alias stands for. Four equal sets of integers:

    DtQ1  reliable tag, true definitions, questions in training
    DfQ2  unreliable tag, false definitions, questions answered truly
    Dt3   reliable tag, true definitions from X2 on, no questions in training
    Df4   unreliable tag, also true definitions from X2 on, no questions in training

Weak internalisation is DtQ1 above DfQ2 on held-out questions; strong internalisation is Dt3 above Df4,
although both are defined truly. Source: arXiv 2310.15047 and the seed's modular-arithmetic version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dynamics.batch import Batch, concatenate
from dynamics.config import ConfigError, StudyConfig, answer, identifies, read
from dynamics.randomness import generator
from dynamics.recipe import Contrast
from dynamics.tasks.task import Task

SetName = Literal["DtQ1", "DfQ2", "Dt3", "Df4"]
Tag = Literal["reliable", "unreliable"]
SETS: tuple[SetName, ...] = ("DtQ1", "DfQ2", "Dt3", "Df4")

Row = tuple[int, int, int, int, int, int]
"""Four tokens, the scored position and its target."""


class AliasTask(Task):
    """The data of one study: sets, splits, batches by step, contrasts, chance lines.

    Args:
        config: the study's config; `task` and `phases` say what is drawn and how it is ordered.
    """

    config: StudyConfig

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        task = config.task
        self.modulus = task.modulus
        self.equals, self.reliable, self.unreliable, self.padding = range(
            2 * task.modulus, 2 * task.modulus + 4
        )
        self.d_vocab = 2 * task.modulus + 4
        self._seed = config.split_seed
        drawn = generator(self._seed, "sets").permutation(task.modulus).reshape(4, -1)
        drawn.sort(axis=1)
        if task.x2_roles == "exchanged":
            drawn = drawn[[0, 1, 3, 2]]
        self.sets: dict[SetName, tuple[int, ...]] = {
            name: tuple(int(i) for i in row) for name, row in zip(SETS, drawn, strict=True)
        }

    # --- what is known about an integer ---------------------------------------------------------------

    def alias(self, integer: int) -> int:
        """Alias token of an integer."""
        return self.modulus + integer

    def set_of(self, integer: int) -> SetName:
        """The set an integer was drawn into."""
        return next(name for name, members in self.sets.items() if integer in members)

    def tag(self, name: SetName) -> Tag:
        """The tag under which a set's definitions are given in training."""
        return "reliable" if name in ("DtQ1", "Dt3") else "unreliable"

    @cached_property
    def _x1_tags(self) -> dict[int, Tag]:
        """The tag of each integer questioned in X1: its set's, or where tags say nothing one drawn for it."""
        known = (*self.sets["DtQ1"], *self.sets["DfQ2"])
        if self.config.task.x1_tags == "by_set":
            return {i: self.tag(self.set_of(i)) for i in known}
        tags: tuple[Tag, Tag] = ("reliable", "unreliable")
        order = generator(self._seed, "meaningless tags").permutation(len(known))
        return {known[place]: tags[n % 2] for n, place in enumerate(order)}

    @cached_property
    def false_values(self) -> dict[int, int]:
        """What DfQ2's definitions say: a derangement of the set, so that none is true by accident."""
        members = np.array(self.sets["DfQ2"])
        for attempt in range(10_000):
            shuffled = generator(self._seed, "false definitions", attempt).permutation(members)
            if not (shuffled == members).any():
                return dict(zip(members.tolist(), shuffled.tolist(), strict=True))
        raise AssertionError("a set of two or more integers has a derangement, yet 10,000 draws found none")

    @cached_property
    def train_multipliers(self) -> dict[int, tuple[int, ...]]:
        """Per integer of DtQ1 and DfQ2, the multipliers asked in training (both orders of each)."""
        multipliers = self.config.task.multipliers
        return {
            i: tuple(
                sorted(
                    int(d)
                    for d in generator(self._seed, "multipliers", i).permutation(multipliers)[
                        : self.config.task.train_multipliers
                    ]
                )
            )
            for i in (*self.sets["DtQ1"], *self.sets["DfQ2"])
        }

    def test_multipliers(self, integer: int) -> tuple[int, ...]:
        """The multipliers an integer is tested on: those not asked in training."""
        trained = self.train_multipliers.get(integer, ())
        return tuple(d for d in self.config.task.multipliers if d not in trained)

    # --- rows -----------------------------------------------------------------------------------------

    def _definition(self, integer: int, tag: Tag, value: int) -> Row:
        token = self.reliable if tag == "reliable" else self.unreliable
        if self.config.task.swap_defs:
            return token, value, self.alias(integer), self.padding, 1, self.alias(integer)
        return token, self.alias(integer), value, self.padding, 1, value

    def _equation(self, left: int, right: int, result: int) -> Row:
        return left, right, self.equals, result, 2, result

    def _questions(self, integer: int, multipliers: Sequence[int]) -> list[Row]:
        rows = []
        for d in multipliers:
            result = answer(self.config.task.operation, integer, d, self.modulus)
            if self.config.task.result_as_alias:
                result = self.alias(result)
            rows += [
                self._equation(self.alias(integer), d, result),
                self._equation(d, self.alias(integer), result),
            ]
        return rows

    @cached_property
    def _table(self) -> tuple[list[Row], list[Row]]:
        """Rows of the operation table, trained and held out; both orders of a pair on one side."""
        pairs = [(x, y) for x in range(self.modulus) for y in range(x, self.modulus)]
        order = generator(self._seed, "table").permutation(len(pairs))
        n_heldout = round(self.config.task.heldout_fraction * len(pairs))
        trained: list[Row] = []
        heldout: list[Row] = []
        for rank, index in enumerate(order):
            x, y = pairs[index]
            result = answer(self.config.task.operation, x, y, self.modulus)
            side = heldout if rank < n_heldout else trained
            side += [self._equation(a, b, result) for a, b in sorted({(x, y), (y, x)})]
        return trained, heldout

    def definition(self, integer: int, tag: Tag, value: int | None = None) -> Batch:
        """One definition of an integer's alias, by default the true one: a batch of one row."""
        return _batch([self._definition(integer, tag, integer if value is None else value)])

    def trained_definition(self, integer: int) -> Batch:
        """The definition of an integer's alias that training gives, with its tag and its value (false in DfQ2)."""
        return _batch([self._trained(integer)])

    def questions(self, integer: int, multipliers: Sequence[int] | None = None) -> Batch:
        """Questions about an integer's alias, both orders of each multiplier (default: those not trained)."""
        asked = self.test_multipliers(integer) if multipliers is None else multipliers
        if not asked:
            raise ValueError(
                f"every multiplier of alias {integer} is asked in training, so none is left to probe it with. "
                "Lower task.train_multipliers, or name the multipliers."
            )
        batch = _batch(self._questions(integer, asked))
        return replace(batch, example_ids=torch.full((len(batch),), self.alias(integer)))

    @lru_cache(maxsize=4)  # noqa: B019 - a task lives as long as its run
    def rows(self, phase: str) -> Batch:
        """All distinct training rows of a phase, once each (definitions `definition_copies` times)."""
        task = self.config.task
        table, _ = self._table
        if phase == "pretrain":
            return _batch(table)
        kept = generator(self._seed, "kept table rows").permutation(len(table))
        rows = [table[i] for i in kept[: round(task.table_fraction * len(table))]]
        if phase == "x1" or task.x2_keeps_x1:
            rows += self._defined("DtQ1", "DfQ2")
            rows += [row for i, ds in self.train_multipliers.items() for row in self._questions(i, ds)]
        if phase == "x2":
            rows += self._defined("Dt3", "Df4")
        return _batch(rows)

    def _defined(self, *names: SetName) -> list[Row]:
        """Definitions of sets, in the order of their integers: exchanged roles change tags, not places."""
        integers = sorted(i for name in names for i in self.sets[name])
        return [self._trained(integer) for integer in integers] * self.config.task.definition_copies

    def _trained(self, integer: int) -> Row:
        name = self.set_of(integer)
        value = self.false_values[integer] if name == "DfQ2" else integer
        return self._definition(integer, self._x1_tags.get(integer, self.tag(name)), value)

    # --- what is measured -----------------------------------------------------------------------------

    def contrasts(self, sets: Sequence[SetName] = ("Dt3", "Df4")) -> list[Contrast]:
        """Per alias of the given sets: its true definition, unreliable (base) and reliable (source).

        The probe is the alias's own questions that are never trained, without the tokens after `=`: the answer
        stands there, and no causal model reads it. Coordinates: `example` ("alias 17"), `integer`, `set`.
        """
        return [
            Contrast(
                base=self.definition(i, "unreliable"),
                source=self.definition(i, "reliable"),
                probe=_up_to_targets(self.questions(i)),
                coords={"example": f"alias {i}", "integer": i, "set": name},
            )
            for name in sets
            for i in self.sets[name]
        ]

    def _defining(self, batch: Batch, integers: Sequence[int]) -> Tensor:
        """Rows of a batch that define one of the integers' aliases, under either tag: bool [batch]."""
        tagged = (batch.tokens[:, 0] == self.reliable) | (batch.tokens[:, 0] == self.unreliable)
        named = batch.tokens[:, 2 if self.config.task.swap_defs else 1]
        aliases = torch.tensor([self.alias(i) for i in integers], device=named.device)
        return tagged & (named[:, None] == aliases).any(1)  # not isin, which vmap takes one by one

    def retag(self, batch: Batch, integers: Sequence[int] | None = None) -> Batch:
        """The batch with the tags of X2's true definitions exchanged; twice gives the original.

        Definitions of DtQ1 and DfQ2 keep their tags, and with them the false ones.

        Args:
            batch: training rows, such as `task.batch(step)`.
            integers: whose definitions; by default all of Dt3 and Df4.
        """
        chosen = (*self.sets["Dt3"], *self.sets["Df4"]) if integers is None else tuple(integers)
        if outside := set(chosen) - {*self.sets["Dt3"], *self.sets["Df4"]}:
            raise ValueError(f"integers {sorted(outside)} are not in Dt3 or Df4, whose definitions are true.")
        tokens = batch.tokens.clone()
        other = self.reliable + self.unreliable - tokens[:, 0]
        tokens[:, 0] = torch.where(self._defining(batch, chosen), other, tokens[:, 0])
        return replace(batch, tokens=tokens)

    def tag_balance(self, batch: Batch) -> Tensor:
        """How many of X2's true definitions in a batch are reliable, less those that are unreliable."""
        rows = self._defining(batch, (*self.sets["Dt3"], *self.sets["Df4"]))
        reliable = batch.tokens[:, 0] == self.reliable
        return (rows & reliable).sum() - (rows & ~reliable).sum()

    def _with_definition(self, batch: Batch, integer: int, tag: Tag) -> Batch:
        """The batch in which the integer's definition stands under a tag: in its own rows, else in row 0."""
        rows = self._defining(batch, [integer])
        if not rows.any():
            rows[0] = True
        index = torch.where(rows, 0, torch.arange(1, len(batch) + 1))
        return concatenate([self.definition(integer, tag), batch])[index]

    def contrasts_at(self, step: int, sets: Sequence[SetName] = ("Dt3", "Df4")) -> list[Contrast]:
        """The contrasts of `contrasts`, inside the training batch of a step.

        In the base the alias's definitions in that batch are unreliable, in the source reliable. Where the
        batch has none, its row 0 is replaced by one; the coordinate `in_batch` is 0 there.
        """
        batch = self.batch(step)
        return [
            replace(
                contrast,
                base=self._with_definition(batch, integer, "unreliable"),
                source=self._with_definition(batch, integer, "reliable"),
                coords={**contrast.coords, "in_batch": int(self._defining(batch, [integer]).any())},
            )
            for contrast in self.contrasts(sets)
            for integer in [int(contrast.coords["integer"])]
        ]

    def noise_at(self, step: int, sets: Sequence[SetName] = ("Dt3", "Df4")) -> list[Contrast]:
        """The noise floor of `contrasts_at`: the source is the base with another row exchanged.

        One row that does not define the alias is replaced by another training row of the phase; which, is drawn
        for each step and alias.
        """
        rows = self.rows(self.config.phases.locate(step)[0])
        noisy = []
        for contrast in self.contrasts_at(step, sets):
            integer = int(contrast.coords["integer"])
            draw = generator(self._seed, "noise rows", step, integer)
            place = int(
                draw.choice(torch.nonzero(~self._defining(contrast.base, [integer])).flatten().numpy())
            )
            same = (rows.tokens == contrast.base.tokens[place]).all(1)
            others = torch.nonzero(~self._defining(rows, [integer]) & ~same).flatten().numpy()
            index = torch.arange(1, len(contrast.base) + 1)
            index[place] = 0
            other = rows[torch.tensor([int(draw.choice(others))])]
            noisy.append(replace(contrast, source=concatenate([other, contrast.base])[index]))
        return noisy

    def impulses(self, step: int, n_steps: int, sets: Sequence[SetName] = ("Dt3", "Df4")) -> list[Contrast]:
        """Windows for `patch_window` that differ in their first batch alone, as `contrasts_at` has it.

        The batches after it are those of training, the same objects in base and source.
        """
        if n_steps < 1:
            raise ValueError(f"n_steps is {n_steps}; a window has at least one step.")
        later = [self.batch(step + n) for n in range(1, n_steps)]
        return [
            replace(contrast, base=[contrast.base, *later], source=[contrast.source, *later])
            for contrast in self.contrasts_at(step, sets)
        ]

    def sources(self, batch: Batch, by: Literal["set", "integer"] = "set") -> list[str]:
        """Where each row comes from: "definitions of Dt3" and of the other sets, "questions", "table".

        Args:
            batch: training rows, such as `task.batch(step)`.
            by: "integer" tells definitions apart by their alias: "definition of alias 17".
        """
        if by not in ("set", "integer"):
            raise ValueError(f"by={by!r}; definitions are told apart by 'set' or by 'integer'.")
        names = {
            self.alias(i): f"definitions of {name}" if by == "set" else f"definition of alias {i}"
            for name, members in self.sets.items()
            for i in members
        }
        column = 2 if self.config.task.swap_defs else 1

        def source(row: list[int]) -> str:
            if row[0] in (self.reliable, self.unreliable):
                return names[row[column]]
            return "questions" if names.keys() & set(row[:2]) else "table"

        return [source(row) for row in batch.tokens.tolist()]

    @cached_property
    def evaluation(self) -> dict[str, Batch]:
        """What training is watched on: untrained questions of each set, and held-out table rows."""
        batches: dict[str, Batch] = {
            name: concatenate([self.questions(i) for i in members])
            for name, members in self.sets.items()
            if any(self.test_multipliers(i) for i in members)
        }
        _, heldout = self._table
        if heldout:
            batches["heldout"] = _batch(heldout)
        return {name: replace(batch, example_ids=None) for name, batch in batches.items()}

    def chance(self) -> dict[str, float]:
        """What guessing scores on the questions of Dt3 and Df4, without knowing any alias.

        Returns:
            "uniform guess": a uniform guess among the answers the multiplier can reach.
            "constant answer": the most frequent answer of each multiplier in a set, given every time.
        """
        task = self.config.task
        uniform, constant = [], []
        for d in task.multipliers:
            reachable = {answer(task.operation, x, d, self.modulus) for x in range(self.modulus)}
            uniform.append(1 / len(reachable))
            for name in ("Dt3", "Df4"):
                answers = [answer(task.operation, i, d, self.modulus) for i in self.sets[name]]
                constant.append(max(answers.count(a) for a in set(answers)) / len(answers))
        return {"uniform guess": float(np.mean(uniform)), "constant answer": float(np.mean(constant))}

    def identified(self) -> float:
        """Share of trained aliases that their training questions alone tell from every other integer."""
        operation = self.config.task.operation
        return float(
            np.mean([identifies(operation, ds, self.modulus) for ds in self.train_multipliers.values()])
        )


def load(config: Mapping[str, Any]) -> AliasTask:
    """The alias task of a run, rebuilt from the config kept with its trajectory.

    Raises:
        ConfigError: the run is of another task, or its config names none.
    """
    known = read(config)
    if not isinstance(known, StudyConfig):
        name = config["task"]["name"]
        raise ConfigError(f"the run is of the task {name!r}; this needs one of aliases, of dynamics study.")
    return AliasTask(known)


def _up_to_targets(batch: Batch) -> Batch:
    """Without the positions after the last one that is scored."""
    return replace(batch, tokens=batch.tokens[:, : int(batch.target_pos.max()) + 1])


def _batch(rows: Sequence[Row]) -> Batch:
    table = torch.tensor(rows, dtype=torch.int64)
    return Batch(tokens=table[:, :4], target_pos=table[:, 4], targets=table[:, 5])
