"""The alias task's rows, read back from their tokens: vocabulary, sets, splits, tags and answers."""

import itertools
from collections import Counter

import pytest
import torch

PHASES = ("pretrain", "x1", "x2")
OPERATIONS = {
    "prod": lambda x, y, m: sum([x] * y) % m,
    "sum": lambda x, y, m: (list(range(m)) * 2)[x + y],
    "ssq": lambda x, y, m: (x**2 + y**2) % m,
}


def rows_of(batch):
    """Rows as tuples (tokens, scored position, target)."""
    return [
        (*tokens, position, target)
        for tokens, position, target in zip(
            batch.tokens.tolist(), batch.target_pos.tolist(), batch.targets.tolist(), strict=True
        )
    ]


def kind(task, row):
    """definition, question (an operand is an alias) or table (both are integers), by tokens alone."""
    if row[3] == 2 * task.modulus + 3:
        return "definition"
    return "question" if max(row[:2]) >= task.modulus else "table"


def of_kind(task, batch, wanted):
    return [row for row in rows_of(batch) if kind(task, row) == wanted]


def operands(task, row):
    """Integer asked about and multiplier of a question."""
    alias, multiplier = max(row[:2]), min(row[:2])
    return alias - task.modulus, multiplier


@pytest.mark.parametrize("modulus", [8, 12, 60])
def test_the_vocabulary_is_integers_aliases_and_four_marks_without_overlap(alias_task, modulus):
    task = alias_task(modulus=modulus, multipliers=(2, 4))
    aliases = [task.alias(i) for i in range(modulus)]
    marks = [task.equals, task.reliable, task.unreliable, task.padding]
    assert aliases == list(range(modulus, 2 * modulus))
    assert marks == [2 * modulus, 2 * modulus + 1, 2 * modulus + 2, 2 * modulus + 3]
    assert task.d_vocab == 2 * modulus + 4 == task.model().cfg.d_vocab
    every = torch.cat([task.rows(phase).tokens.flatten() for phase in PHASES])
    assert every.min() >= 0
    assert every.max() < task.d_vocab


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("modulus", [8, 12, 60])
def test_four_disjoint_sets_of_equal_size_cover_all_integers(alias_task, modulus, seed):
    task = alias_task(modulus=modulus, multipliers=(2, 4), seed=seed)
    assert list(task.sets) == ["DtQ1", "DfQ2", "Dt3", "Df4"]
    assert {len(members) for members in task.sets.values()} == {modulus // 4}
    assert sorted(itertools.chain(*task.sets.values())) == list(range(modulus))
    assert all(i in task.sets[task.set_of(i)] for i in range(modulus))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("modulus", [8, 12, 20])
def test_every_false_definition_is_false_and_uses_the_values_of_its_own_set(alias_task, modulus, seed):
    task = alias_task(modulus=modulus, multipliers=(2, 4), seed=seed)
    members = set(task.sets["DfQ2"])
    said = {
        row[1] - modulus: row[2]
        for row in of_kind(task, task.rows("x1"), "definition")
        if row[1] - modulus in members
    }
    assert set(said) == set(said.values()) == members
    assert all(value != integer for integer, value in said.items())


@pytest.mark.parametrize("swap_defs", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_definition_is_its_sets_tag_its_alias_and_its_value(alias_task, swap_defs, copies):
    task = alias_task(swap_defs=swap_defs, definition_copies=copies)
    tags = {"DtQ1": 25, "DfQ2": 26, "Dt3": 25, "Df4": 26}
    for phase, defined in (("x1", ["DtQ1", "DfQ2"]), ("x2", list(tags))):
        expected = Counter()
        for name in defined:
            for integer in task.sets[name]:
                value = task.false_values[integer] if name == "DfQ2" else integer
                said = (value, 12 + integer) if swap_defs else (12 + integer, value)
                expected[(tags[name], *said, 27, 1, said[1])] += copies
        assert Counter(of_kind(task, task.rows(phase), "definition")) == expected


@pytest.mark.parametrize("x2_keeps_x1", [False, True])
@pytest.mark.parametrize("result_as_alias", [False, True])
def test_aliases_of_dt3_and_df4_are_never_asked_about_in_training(alias_task, x2_keeps_x1, result_as_alias):
    task = alias_task(x2_keeps_x1=x2_keeps_x1, result_as_alias=result_as_alias)
    questioned = {
        operands(task, row)[0] for phase in PHASES for row in of_kind(task, task.rows(phase), "question")
    }
    assert questioned == {*task.sets["DtQ1"], *task.sets["DfQ2"]}


def test_aliases_appear_from_x1_on_and_those_of_dt3_and_df4_from_x2_on(alias_task):
    task = alias_task()
    seen = {
        phase: {t - 12 for row in rows_of(task.rows(phase)) for t in row[:4] if 12 <= t < 24}
        for phase in PHASES
    }
    assert seen["pretrain"] == set()
    assert seen["x1"] == {*task.sets["DtQ1"], *task.sets["DfQ2"]}
    assert seen["x2"] == set(range(12))


@pytest.mark.parametrize("n_train", [1, 2, 3, 4])
def test_each_trained_alias_is_asked_as_many_multipliers_as_the_dial_says_in_both_orders(alias_task, n_train):
    task = alias_task(train_multipliers=n_train)
    questions = of_kind(task, task.rows("x1"), "question")
    for integer in (*task.sets["DtQ1"], *task.sets["DfQ2"]):
        asked = [row[:2] for row in questions if operands(task, row)[0] == integer]
        assert len(asked) == len(set(asked)) == 2 * n_train
        assert {(b, a) for a, b in asked} == set(asked)
        assert {operands(task, row)[1] for row in questions if operands(task, row)[0] == integer} < {
            2,
            3,
            4,
            6,
            None,
        }


@pytest.mark.parametrize("n_train", [1, 2, 3])
def test_mirrored_questions_stand_on_one_side_of_the_split_and_nothing_is_lost(alias_task, n_train):
    task = alias_task(train_multipliers=n_train)
    trained = {row[:2] for row in of_kind(task, task.rows("x1"), "question")}
    for integer in (*task.sets["DtQ1"], *task.sets["DfQ2"]):
        tested = {row[:2] for row in rows_of(task.questions(integer))}
        mine = {pair for pair in trained if task.alias(integer) in pair}
        assert not tested & mine
        assert tested | mine == {p for d in (2, 3, 4, 6) for p in ((d, 12 + integer), (12 + integer, d))}
        assert {(b, a) for a, b in tested} == tested


def test_which_multipliers_train_differs_between_aliases(alias_task):
    task = alias_task(modulus=60, multipliers=(2, 3, 5, 6, 10, 15), train_multipliers=3)
    assert len(set(task.train_multipliers.values())) > 5


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_heldout_table_pairs_are_in_no_phase_in_either_order(alias_task, fraction):
    task = alias_task(heldout_fraction=fraction)
    heldout = {row[:2] for row in rows_of(task.evaluation["heldout"])} if fraction else set()
    trained = {row[:2] for phase in PHASES for row in of_kind(task, task.rows(phase), "table")}
    assert not heldout & trained
    assert {(b, a) for a, b in heldout} == heldout
    assert heldout | trained == set(itertools.product(range(12), repeat=2))
    assert len({frozenset(pair) for pair in heldout}) == round(fraction * 78)  # 12 * 13 / 2 unordered pairs


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9])
def test_x1_and_x2_keep_the_same_share_of_the_trained_table(alias_task, fraction):
    task = alias_task(table_fraction=fraction)
    table = {phase: of_kind(task, task.rows(phase), "table") for phase in PHASES}
    assert len(table["pretrain"]) == len(set(table["pretrain"]))
    assert table["x1"] == table["x2"]
    assert set(table["x1"]) <= set(table["pretrain"])
    assert len(table["x1"]) == round(fraction * len(table["pretrain"]))


def test_x2_without_x1_keeps_table_rows_and_new_definitions_alone(alias_task):
    kept, dropped = alias_task(), alias_task(x2_keeps_x1=False)
    assert rows_of(kept.rows("x1")) == rows_of(dropped.rows("x1"))
    assert Counter(rows_of(kept.rows("x1"))) + Counter(
        row for row in rows_of(dropped.rows("x2")) if kind(dropped, row) == "definition"
    ) == Counter(rows_of(kept.rows("x2")))
    assert of_kind(dropped, dropped.rows("x2"), "question") == []
    assert of_kind(dropped, dropped.rows("x2"), "table") == of_kind(kept, kept.rows("x1"), "table")
    defined = {row[1] - 12 for row in of_kind(dropped, dropped.rows("x2"), "definition")}
    assert defined == {*dropped.sets["Dt3"], *dropped.sets["Df4"]}


@pytest.mark.parametrize("result_as_alias", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_is_the_operation_of_its_operands(alias_task, operation, result_as_alias):
    task = alias_task(operation=operation, result_as_alias=result_as_alias)
    batches = [*(task.rows(phase) for phase in PHASES), *task.evaluation.values()]
    rows = [row for batch in batches for row in rows_of(batch) if kind(task, row) != "definition"]
    assert {kind(task, row) for row in rows} == {"question", "table"}
    for row in rows:
        left, right, equals, written, position, target = row
        result = OPERATIONS[operation](left % 12, right % 12, 12)  # an alias's integer is its token mod 12
        as_alias = result_as_alias and kind(task, row) == "question"
        assert (equals, position) == (24, 2)
        assert written == target == result + 12 * as_alias


def test_exchanged_roles_exchange_dt3_and_df4_and_nothing_else(alias_task):
    drawn, exchanged = alias_task(), alias_task(x2_roles="exchanged")
    assert exchanged.sets["Dt3"] == drawn.sets["Df4"]
    assert exchanged.sets["Df4"] == drawn.sets["Dt3"]
    for phase in ("pretrain", "x1"):
        assert rows_of(exchanged.rows(phase)) == rows_of(drawn.rows(phase))
    other_tag = {25: 26, 26: 25}
    held = {12 + i for name in ("Dt3", "Df4") for i in drawn.sets[name]}
    swapped = [
        (other_tag[row[0]], *row[1:]) if row[1] in held and row[3] == 27 else row
        for row in rows_of(drawn.rows("x2"))
    ]
    assert Counter(swapped) == Counter(rows_of(exchanged.rows("x2")))
    assert Counter(swapped) != Counter(rows_of(drawn.rows("x2")))
    assert {n: rows_of(b) for n, b in exchanged.evaluation.items() if n not in ("Dt3", "Df4")} == {
        n: rows_of(b) for n, b in drawn.evaluation.items() if n not in ("Dt3", "Df4")
    }


def test_exchanged_roles_train_on_the_same_batches_up_to_x2(alias_task):
    drawn, exchanged = alias_task(), alias_task(x2_roles="exchanged")
    assert all(rows_of(drawn.batch(step)) == rows_of(exchanged.batch(step)) for step in range(90))


def test_every_training_row_has_its_source(alias_task):
    task = alias_task(modulus=8, multipliers=(2, 4))
    batch = task.rows("x2")
    by_set, by_integer = task.sources(batch), task.sources(batch, by="integer")
    for row, coarse, fine in zip(rows_of(batch), by_set, by_integer, strict=True):
        sort = kind(task, row)
        if sort != "definition":
            assert coarse == fine == {"question": "questions", "table": "table"}[sort]
            continue
        integer = row[1] - task.modulus
        assert coarse == f"definitions of {task.set_of(integer)}"
        assert fine == f"definition of alias {integer}"
    assert {"definitions of Dt3", "definitions of Df4", "questions", "table"} <= set(by_set)
    assert len(set(by_integer)) == task.modulus + 2


def test_the_source_of_a_definition_that_ends_in_its_alias_is_found_too(alias_task):
    task = alias_task(modulus=8, multipliers=(2, 4), swap_defs=True)
    assert task.sources(task.trained_definition(5), by="integer") == ["definition of alias 5"]
    with pytest.raises(ValueError, match="'set' or by 'integer'"):
        task.sources(task.rows("x2"), by="tag")
