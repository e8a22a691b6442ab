"""Contrasts inside real training batches: exchanged tags, one alias's definition, noise, impulses."""

import copy
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dynamics as dy
from dynamics import sites
from dynamics.batch import Batch

SETS = ("DtQ1", "DfQ2", "Dt3", "Df4")
RELIABLE, UNRELIABLE, PADDING = 25, 26, 27
X2 = range(90, 150)

x2_steps = st.integers(X2.start, X2.stop - 1)
every_step = st.integers(0, X2.stop - 1)
examples = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
both_orders = pytest.mark.parametrize("swap_defs", [False, True])


@pytest.fixture
def task(alias_task):
    """Aliases 12..23 of the integers 0..11, and x2 from step 90 on."""
    return alias_task(definition_copies=2)


def rows(batch):
    """Rows as tuples (tokens, scored position, target)."""
    return [
        (*tokens, position, target)
        for tokens, position, target in zip(
            batch.tokens.tolist(), batch.target_pos.tolist(), batch.targets.tolist(), strict=True
        )
    ]


def defined(row, swap_defs=False):
    """The integer whose alias a row defines, None for a question or a sum; by its tokens alone."""
    return row[2 if swap_defs else 1] - 12 if row[3] == PADDING else None


def true_definition(integer, tag, swap_defs=False):
    said = (integer, 12 + integer) if swap_defs else (12 + integer, integer)
    return (tag, *said, PADDING, 1, said[1])


def frozen(task):
    """Everything the task hands out more than once, copied."""
    return copy.deepcopy({phase: rows(task.rows(phase)) for phase in ("pretrain", "x1", "x2")})


# --- exchanged tags ---------------------------------------------------------------------------------------


@both_orders
def test_tags_exchanged_twice_are_the_batch_itself(alias_task, swap_defs):
    task = alias_task(swap_defs=swap_defs, definition_copies=2)

    @examples
    @given(step=every_step, some=st.sets(st.sampled_from([*task.sets["Dt3"], *task.sets["Df4"]])))
    def check(step, some):
        batch = task.batch(step)
        for integers in (None, tuple(some)):
            assert rows(task.retag(task.retag(batch, integers), integers)) == rows(batch)

    check()


@both_orders
def test_only_the_tags_of_x2s_true_definitions_are_exchanged(alias_task, swap_defs):
    task = alias_task(swap_defs=swap_defs, definition_copies=2)
    other = {RELIABLE: UNRELIABLE, UNRELIABLE: RELIABLE}
    n_changed, kept = 0, set()
    for step in range(150):
        batch = task.batch(step)
        for before, after in zip(rows(batch), rows(task.retag(batch)), strict=True):
            integer = defined(before, swap_defs)
            if integer is not None and task.set_of(integer) in ("Dt3", "Df4"):
                assert after == (other[before[0]], *before[1:])
                n_changed += 1
            else:
                assert after == before
                kept.add(integer)
    assert n_changed > 100
    assert {*task.sets["DtQ1"], *task.sets["DfQ2"]} < kept


def test_tags_are_exchanged_for_the_integers_that_are_named_alone(task):
    chosen = task.sets["Dt3"][0]
    batch = task.rows("x2")
    changed = [
        defined(before)
        for before, after in zip(rows(batch), rows(task.retag(batch, [chosen])), strict=True)
        if before != after
    ]
    assert changed == [chosen] * 2
    assert rows(task.retag(batch, ())) == rows(batch)


def test_a_definition_of_an_exchanged_tag_is_the_one_of_exchanged_roles(alias_task):
    """What retagging makes of all x2 rows is what the study with Dt3 and Df4 exchanged trains on."""
    drawn, exchanged = alias_task(), alias_task(x2_roles="exchanged")
    for step in X2:
        assert rows(drawn.retag(drawn.batch(step))) == rows(exchanged.batch(step))


@pytest.mark.parametrize("outside", ["DtQ1", "DfQ2"])
def test_sets_without_true_definitions_in_x2_are_not_retagged(task, outside):
    wrong = task.sets[outside][0]
    with pytest.raises(ValueError, match=rf"integers \[{wrong}\] are not in Dt3 or Df4"):
        task.retag(task.batch(100), [task.sets["Dt3"][0], wrong])
    with pytest.raises(ValueError, match=r"integers \[99\] are not in Dt3 or Df4"):
        task.retag(task.batch(100), [99])


def test_retagging_leaves_further_fields_of_a_batch_alone(task):
    batch = task.batch(100)
    full = Batch(batch.tokens, batch.target_pos, batch.targets, batch.tokens[:, :2], torch.arange(16))
    found = task.retag(full)
    for field in fields(Batch):
        if field.name != "tokens":
            assert getattr(found, field.name) is getattr(full, field.name)


# --- an alias inside a batch -------------------------------------------------------------------------------


@both_orders
@pytest.mark.parametrize("batch_size", [16, 64])
def test_base_and_source_differ_in_the_tag_of_the_aliass_own_rows_alone(alias_task, batch_size, swap_defs):
    task = alias_task(batch_size=batch_size, swap_defs=swap_defs, definition_copies=2)
    in_batch, several = 0, 0
    for step in X2[::6]:
        original = rows(task.batch(step))
        for contrast in task.contrasts_at(step):
            integer = contrast.coords["integer"]
            places = [i for i, row in enumerate(original) if defined(row, swap_defs) == integer]
            in_batch += contrast.coords["in_batch"]
            several += len(places) > 1
            assert contrast.coords["in_batch"] == bool(places)
            for side, tag in ((contrast.base, UNRELIABLE), (contrast.source, RELIABLE)):
                expected = list(original)
                for place in places or [0]:
                    expected[place] = true_definition(integer, tag, swap_defs)
                assert rows(side) == expected
            differing = (contrast.base.tokens != contrast.source.tokens).nonzero().tolist()
            assert differing == [[place, 0] for place in places or [0]]
    assert 0 < in_batch < len(X2[::6]) * 6
    assert several > 0


def test_an_alias_that_the_batch_does_not_define_takes_row_0_and_says_so(alias_task):
    task = alias_task()
    for step in (0, 60):  # before x2 no alias of its sets is defined
        original = rows(task.batch(step))
        for contrast in task.contrasts_at(step):
            assert contrast.coords["in_batch"] == 0
            assert rows(contrast.base)[1:] == rows(contrast.source)[1:] == original[1:]
            assert rows(contrast.base)[0] == true_definition(contrast.coords["integer"], UNRELIABLE)
            assert rows(contrast.source)[0] == true_definition(contrast.coords["integer"], RELIABLE)


def test_one_side_is_the_training_batch_itself_where_it_defines_the_alias(task):
    found = set()
    for step in X2:
        original = rows(task.batch(step))
        for contrast in task.contrasts_at(step):
            if contrast.coords["in_batch"]:
                reliable = contrast.coords["set"] == "Dt3"
                assert rows(contrast.source if reliable else contrast.base) == original
                found.add(reliable)
    assert found == {False, True}


def test_labels_and_probes_are_those_of_the_contrasts_without_a_batch(task):
    for given_sets in (("Dt3", "Df4"), ("Df4",), ("DtQ1", "Dt3")):
        alone, inside = task.contrasts(given_sets), task.contrasts_at(100, given_sets)
        assert [
            c.coords | {"in_batch": i.coords["in_batch"]} for c, i in zip(alone, inside, strict=True)
        ] == [i.coords for i in inside]
        assert [rows(c.probe) for c in alone] == [rows(i.probe) for i in inside]


@pytest.mark.slow
@examples
@given(data=st.data())
def test_contrasts_at_a_step_are_the_same_from_two_tasks_asked_in_any_order(alias_task, data):
    one, other = alias_task(), alias_task()
    first, second = data.draw(x2_steps), data.draw(x2_steps)
    other.contrasts_at(second)
    for call in ("contrasts_at", "noise_at"):
        mine, theirs = getattr(one, call)(first), getattr(other, call)(first)
        assert [rows(c.base) + rows(c.source) for c in mine] == [
            rows(c.base) + rows(c.source) for c in theirs
        ]


def test_a_step_outside_the_run_is_refused_by_all(task):
    for call in (task.contrasts_at, task.noise_at, lambda step: task.impulses(step, 2)):
        for step in (-1, 150):
            with pytest.raises(ValueError, match=r"outside the run's steps 0\.\.149"):
                call(step)
    with pytest.raises(ValueError, match="outside the run's steps"):
        task.impulses(148, 3)
    assert len(task.impulses(148, 2)[0].base) == 2


# --- noise ------------------------------------------------------------------------------------------------


def differing_rows(contrast):
    return [
        i for i, (b, s) in enumerate(zip(rows(contrast.base), rows(contrast.source), strict=True)) if b != s
    ]


@pytest.mark.slow
@both_orders
def test_noise_exchanges_one_row_that_does_not_define_the_alias_for_another_of_the_phase(
    alias_task, swap_defs
):
    task = alias_task(swap_defs=swap_defs)
    known = set(rows(task.rows("x2")))
    places, drawn = set(), set()
    for step in X2:
        for contrast, noise in zip(task.contrasts_at(step), task.noise_at(step), strict=True):
            assert rows(noise.base) == rows(contrast.base)
            assert rows(noise.probe) == rows(contrast.probe)
            assert noise.coords == contrast.coords
            assert len(noise.source) == len(noise.base)
            for place in differing_rows(noise):
                before, after = rows(noise.base)[place], rows(noise.source)[place]
                assert contrast.coords["integer"] not in (
                    defined(before, swap_defs),
                    defined(after, swap_defs),
                )
                assert after in known
                places.add(place)
                drawn.add(after)
            assert len(differing_rows(noise)) <= 1
    assert len(places) > 8
    assert len(drawn) > 50


def test_noise_always_changes_a_row(task):
    unchanged = [
        (step, noise.coords["integer"])
        for step in X2
        for noise in task.noise_at(step)
        if len(differing_rows(noise)) != 1
    ]
    assert unchanged == []


def test_noise_before_x2_comes_from_the_rows_of_its_own_phase(task):
    for step, phase in ((0, "pretrain"), (39, "pretrain"), (40, "x1"), (89, "x1"), (90, "x2")):
        known = set(rows(task.rows(phase)))
        for noise in task.noise_at(step):
            assert all(rows(noise.source)[place] in known for place in differing_rows(noise))


def test_noise_is_drawn_anew_for_each_step_and_alias(task):
    found = [
        (differing_rows(noise), [rows(noise.source)[i] for i in differing_rows(noise)])
        for step in X2[:8]
        for noise in task.noise_at(step)
    ]
    assert len({str(item) for item in found}) > 0.9 * len(found)


# --- impulses ---------------------------------------------------------------------------------------------


def test_impulses_begin_with_the_contrast_and_go_on_with_training_in_the_same_objects(task):
    impulses, first = task.impulses(100, 4), task.contrasts_at(100)
    assert len(impulses) == len(first) == 6
    for impulse, contrast in zip(impulses, first, strict=True):
        assert len(impulse.base) == len(impulse.source) == 4
        assert rows(impulse.base[0]) == rows(contrast.base)
        assert rows(impulse.source[0]) == rows(contrast.source)
        assert impulse.coords == contrast.coords
        assert rows(impulse.probe) == rows(contrast.probe)
        for n in (1, 2, 3):
            assert impulse.base[n] is impulse.source[n]
            assert impulse.base[n] is impulses[0].base[n]
            assert rows(impulse.base[n]) == rows(task.batch(100 + n))


def test_an_impulse_of_one_step_is_the_contrast_alone(task):
    for impulse, contrast in zip(
        task.impulses(149, 1, ("Df4",)), task.contrasts_at(149, ("Df4",)), strict=True
    ):
        assert [rows(batch) for batch in impulse.base] == [rows(contrast.base)]
        assert [rows(batch) for batch in impulse.source] == [rows(contrast.source)]


@pytest.mark.slow
def test_the_windows_of_impulses_take_one_gradient_for_the_batches_they_share(task):
    """Counted through patch_window, on the study's own recipe."""
    recipe = task.recipe()
    calls = []

    def loss(model, batch):
        calls.append(batch)
        return recipe.loss(model, batch)

    counted = dy.Recipe(recipe.model, loss, recipe.optimizer, recipe.scheduler, recipe.clip)
    (impulse,) = task.impulses(100, 3, ("Dt3",))[:1]
    patched = sites.layers(recipe.model)[:2]
    numbers = []
    for some in (patched[:1], patched):
        calls.clear()
        result = dy.patch_window(
            counted, None, [impulse], some, dy.measures.correct_logit, measured_after=[1, 3]
        )
        numbers.append(len(calls))
    assert numbers[1] - numbers[0] == 3 + 1
    assert (result["effect"] != 0).all()
    assert result["in_batch"].item() in (0, 1)


# --- nothing is changed -----------------------------------------------------------------------------------


@both_orders
def test_none_of_it_changes_a_batch_or_the_rows_they_are_cut_from(alias_task, swap_defs):
    task = alias_task(swap_defs=swap_defs)
    before = frozen(task)
    batch = task.batch(100)
    original = rows(batch)
    task.retag(batch)
    task.retag(task.rows("x2"))
    made = [*task.contrasts_at(100, SETS), *task.noise_at(100)]
    made += [dy.Contrast(i.base[0], i.source[0]) for i in task.impulses(100, 3)]
    for contrast in made:
        contrast.base.tokens.fill_(0)
        contrast.source.tokens.fill_(0)
    assert rows(batch) == original == rows(task.batch(100))
    assert frozen(task) == before


def test_no_global_generator_is_read_or_moved(task):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [rows(c.source) for c in task.noise_at(100)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert [rows(c.source) for c in task.noise_at(100)] == first
