"""x1_tags: in X1 tags tell truth from falsehood, or nothing at all; in X2 they are the sets' own."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import scipy.stats
import torch

from dynamics.config import AliasConfig, ConfigError, StudyConfig
from dynamics.tasks import AliasTask, load

WAYS = ("by_set", "random")
PHASES = ("pretrain", "x1", "x2")


def definitions(task, phase):
    """(tag token, alias, said value) of each defining row of a phase, by tokens alone, and how often it stands."""
    tokens = task.rows(phase).tokens
    rows = tokens[tokens[:, 3] == task.padding].tolist()
    where = (2, 1) if task.config.task.swap_defs else (1, 2)
    return Counter((row[0], row[where[0]] - task.modulus, row[where[1]]) for row in rows)


def tags(task, phase="x1"):
    """integer -> the tags its alias is defined under."""
    found = defaultdict(set)
    for tag, integer, _ in definitions(task, phase):
        found[integer].add({task.reliable: "reliable", task.unreliable: "unreliable"}[tag])
    return found


def known(task):
    return {*task.sets["DtQ1"], *task.sets["DfQ2"]}


def rows_of(batch):
    return list(zip(batch.tokens.tolist(), batch.target_pos.tolist(), batch.targets.tolist(), strict=True))


@pytest.fixture
def random(alias_task):
    """A task whose tags say nothing in X1; keywords as alias_task takes them."""
    return lambda **changes: alias_task(**{"x1_tags": "random", **changes})


# --- X1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("modulus", [8, 12, 20, 60])
def test_each_tag_stands_on_half_of_the_known_integers_and_each_alias_has_one(random, modulus, seed):
    task = random(modulus=modulus, multipliers=(2, 4), study_seed=seed)
    found = tags(task)
    assert set(found) == known(task)
    assert all(len(own) == 1 for own in found.values())
    assert Counter(tag for own in found.values() for tag in own) == {
        "reliable": modulus // 4,
        "unreliable": modulus // 4,
    }


def test_all_copies_of_a_definition_carry_the_same_tag(random):
    assert set(definitions(random(definition_copies=5), "x1").values()) == {5}


def reliable_among(random, name, n=150):
    """How many of a set's 5 integers are defined under the reliable tag, in tasks of n seeds."""
    found = []
    for seed in range(n):
        task = random(modulus=20, multipliers=(2, 4), study_seed=seed)
        of = tags(task)
        found.append(sum(of[i] == {"reliable"} for i in task.sets[name]))
    return np.array(found)


def test_tags_are_drawn_across_both_sets_whatever_is_true(random):
    """Reliable among the 5 true ones of 10 known: hypergeometric, mean 2.5, variance 25/36."""
    true = reliable_among(random, "DtQ1")
    law = scipy.stats.hypergeom(10, 5, 5)
    assert abs(true.mean() - 2.5) < 4 * np.sqrt(law.var() / true.size)
    expected = law.pmf(range(6)) * true.size
    observed = np.bincount(true, minlength=6)
    # the rare ends (0 and 5 of 5, 1 in 252 each) together with their neighbours
    pooled = [[c[0] + c[1], c[2], c[3], c[4] + c[5]] for c in (observed, expected)]
    assert scipy.stats.chisquare(*pooled).pvalue > 0.001
    assert len(set(true)) >= 4


def test_in_every_task_true_and_false_together_have_half_of_each_tag(random):
    true, false = (reliable_among(random, name, n=20) for name in ("DtQ1", "DfQ2"))
    assert (true + false == 5).all()


def test_which_integers_are_reliable_says_nothing_of_their_size(random):
    ranks = []
    for seed in range(100):
        of = tags(random(modulus=20, multipliers=(2, 4), study_seed=seed))
        ranks.append(np.mean([of[i] == {"reliable"} for i in sorted(of)[:5]]))
    assert abs(np.mean(ranks) - 0.5) < 4 * np.std(ranks) / 10


@pytest.mark.parametrize("swap_defs", [False, True])
def test_what_definitions_say_is_the_same_under_either_kind_of_tags(alias_task, swap_defs):
    said = {}
    for way in WAYS:
        task = alias_task(x1_tags=way, modulus=20, swap_defs=swap_defs, multipliers=(2, 4))
        said[way] = Counter()
        for (_, integer, value), copies in definitions(task, "x1").items():
            said[way][integer, value] += copies
        assert all(v == i for i, v in said[way] if i in task.sets["DtQ1"])
        assert all(v != i for i, v in said[way] if i in task.sets["DfQ2"])
    assert said["by_set"] == said["random"]


def test_meaningless_tags_change_nothing_but_the_first_token_of_x1s_definitions(alias_task):
    by_set, meaningless = (alias_task(x1_tags=way, modulus=20, multipliers=(2, 4)) for way in WAYS)
    assert by_set.sets == meaningless.sets
    assert by_set.train_multipliers == meaningless.train_multipliers
    assert rows_of(by_set.rows("pretrain")) == rows_of(meaningless.rows("pretrain"))
    for phase in ("x1", "x2"):
        one, other = by_set.rows(phase), meaningless.rows(phase)
        differing = (one.tokens != other.tokens).nonzero()
        assert len(differing) > 0
        assert set(differing[:, 1].tolist()) == {0}
        defines = one.tokens[differing[:, 0]]
        assert (defines[:, 3] == by_set.padding).all()
        assert {t - 20 for t in defines[:, 1].tolist()} <= known(by_set)
        assert one.target_pos.tolist() == other.target_pos.tolist()
        assert one.targets.tolist() == other.targets.tolist()
    for name, batch in by_set.evaluation.items():
        assert rows_of(batch) == rows_of(meaningless.evaluation[name])


def test_batches_stand_in_the_same_order_under_either_kind_of_tags(alias_task):
    by_set, meaningless = (alias_task(x1_tags=way) for way in WAYS)
    for step in range(150):
        one, other = by_set.batch(step), meaningless.batch(step)
        assert (one.tokens[:, 1:] == other.tokens[:, 1:]).all()
        if step < 40:
            assert (one.tokens == other.tokens).all()


# --- by_set -----------------------------------------------------------------------------------------------


def test_by_default_tags_are_those_of_the_sets(alias_task):
    assert AliasConfig().x1_tags == "by_set"
    for task in (alias_task(), alias_task(x1_tags="by_set")):
        assert all(own == {task.tag(task.set_of(i))} for i, own in tags(task).items())
        assert rows_of(task.rows("x2")) == rows_of(alias_task().rows("x2"))


# --- X2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("roles", ["drawn", "exchanged"])
def test_in_x2_dt3_is_reliable_and_df4_unreliable_and_both_are_true(alias_task, way, roles):
    task = alias_task(x1_tags=way, x2_roles=roles, modulus=20, multipliers=(2, 4))
    held = {i: own for i, own in tags(task, "x2").items() if i not in known(task)}
    assert held == {
        **{i: {"reliable"} for i in task.sets["Dt3"]},
        **{i: {"unreliable"} for i in task.sets["Df4"]},
    }
    assert all(value == i for _, i, value in definitions(task, "x2") if i not in known(task))


def test_x2_keeps_x1s_definitions_under_the_tags_drawn_for_them(random):
    task = random(modulus=20, multipliers=(2, 4))
    in_x2 = Counter({d: n for d, n in definitions(task, "x2").items() if d[1] in known(task)})
    assert in_x2 == definitions(task, "x1")
    assert len(in_x2) == 10


def test_x2_without_x1_has_no_tag_that_was_drawn(random):
    found = tags(random(x2_keeps_x1=False), "x2")
    assert not set(found) & known(random())


def test_exchanged_roles_leave_x1s_drawn_tags_as_they_are(random):
    drawn, exchanged = random(), random(x2_roles="exchanged")
    assert rows_of(drawn.rows("x1")) == rows_of(exchanged.rows("x1"))
    assert all(rows_of(drawn.batch(step)) == rows_of(exchanged.batch(step)) for step in range(90))


# --- drawing ----------------------------------------------------------------------------------------------


def test_two_tasks_of_one_config_draw_the_same_tags_also_through_its_file(random):
    task = random(modulus=20, multipliers=(2, 4), study_seed=4)
    again = random(modulus=20, multipliers=(2, 4), study_seed=4)
    loaded = load(task.config.to_dict())
    assert loaded.config.task.x1_tags == "random"
    assert tags(task) == tags(again) == tags(loaded)


def test_tags_follow_the_seed_of_the_split_and_not_that_of_the_order(random):
    first = random(modulus=20, multipliers=(2, 4), study_seed=0)
    same_split = random(modulus=20, multipliers=(2, 4), study_seed=9, seed=0)
    other_order = random(modulus=20, multipliers=(2, 4), study_seed=0, order_seed=5)
    assert tags(first) == tags(same_split) == tags(other_order)
    assert len({str(sorted(tags(random(modulus=20, seed=s)).items())) for s in range(10)}) == 10


def test_the_tags_are_drawn_apart_from_everything_else_the_seed_draws(random):
    """The same permutation as any other stream's would tie the tags to the sets or the table."""
    order = {}
    for seed in range(30):
        task = random(modulus=20, multipliers=(2, 4), seed=seed)
        of = tags(task)
        members = (*task.sets["DtQ1"], *task.sets["DfQ2"])
        order[seed] = tuple(of[i] == {"reliable"} for i in members)
    assert len(set(order.values())) > 20


@pytest.mark.parametrize("wrong", ["none", "", "by set", None])
def test_another_kind_of_tags_is_refused_and_the_two_are_named(wrong):
    with pytest.raises(ConfigError, match=r"task\.x1_tags is .*'by_set', 'random'"):
        AliasConfig(x1_tags=wrong)


# --- what is made of the tags -----------------------------------------------------------------------------


def x2_steps(task):
    starts = task.config.phases.starts
    return range(starts["x2"], starts["end"])


def test_retagging_twice_gives_the_batch_and_touches_x2s_new_definitions_alone(random):
    task = random()
    held = {*task.sets["Dt3"], *task.sets["Df4"]}
    changed = 0
    for step in x2_steps(task):
        batch = task.batch(step)
        retagged = task.retag(batch)
        assert rows_of(task.retag(retagged)) == rows_of(batch)
        differing = (batch.tokens != retagged.tokens).any(1)
        new = (batch.tokens[:, 3] == task.padding) & torch.isin(
            batch.tokens[:, 1] - 12, torch.tensor(sorted(held))
        )
        assert (differing == new).all()
        assert task.tag_balance(retagged) == -task.tag_balance(batch)
        changed += int(differing.sum())
    assert changed > 20


def test_the_balance_of_tags_counts_x2s_new_definitions_and_not_those_with_drawn_tags(random):
    task = random()
    assert task.tag_balance(task.rows("x1")) == 0
    assert task.tag_balance(task.rows("x2")) == 0  # three of each
    uneven = [task.batch(step) for step in x2_steps(task)]
    by_hand = []
    for batch in uneven:
        rows = batch.tokens[batch.tokens[:, 3] == task.padding].tolist()
        signs = {task.reliable: 1, task.unreliable: -1}
        by_hand.append(sum(signs[row[0]] for row in rows if row[1] - 12 not in known(task)))
    assert [task.tag_balance(batch) for batch in uneven] == by_hand
    assert len(set(by_hand)) > 2


def test_contrasts_are_the_same_under_either_kind_of_tags(alias_task):
    by_set, meaningless = (alias_task(x1_tags=way) for way in WAYS)
    for one, other in zip(by_set.contrasts(), meaningless.contrasts(), strict=True):
        assert one.coords == other.coords
        for side in ("base", "source", "probe"):
            assert rows_of(getattr(one, side)) == rows_of(getattr(other, side))


def test_contrasts_inside_a_batch_set_the_tag_of_their_alias_alone(random):
    task = random()
    step = next(s for s in x2_steps(task) if task.tag_balance(task.batch(s)))
    batch = task.batch(step)
    for contrast in task.contrasts_at(step):
        integer = contrast.coords["integer"]
        for side, token in (("base", task.unreliable), ("source", task.reliable)):
            tokens = getattr(contrast, side).tokens
            own = (tokens[:, 3] == task.padding) & (tokens[:, 1] == task.alias(integer))
            assert own.any()
            assert (tokens[own, 0] == token).all()
            others = ~own
            assert (tokens[others] == batch.tokens[others]).all()


def test_noise_and_impulses_keep_the_drawn_tags_of_their_batches(random):
    task = random(batch_size=32)
    step = task.config.phases.starts["x2"] + 3
    drawn = definitions(task, "x1")
    for contrast in task.noise_at(step):
        rows = [
            r for r in contrast.source.tokens.tolist() if r[3] == task.padding and r[1] - 12 in known(task)
        ]
        assert all((r[0], r[1] - 12, r[2]) in drawn for r in rows)
    for contrast in task.impulses(step, 3):
        assert [rows_of(b) for b in contrast.base[1:]] == [rows_of(task.batch(step + n)) for n in (1, 2)]
        assert contrast.base[1] is contrast.source[1]


def test_definitions_may_still_be_asked_for_under_either_tag(random):
    task = random()
    integer = task.sets["DtQ1"][0]
    for tag, token in (("reliable", task.reliable), ("unreliable", task.unreliable)):
        assert task.definition(integer, tag).tokens.tolist() == [[token, 12 + integer, integer, task.padding]]


def test_the_default_study_can_be_had_with_meaningless_tags():
    config = StudyConfig(task=AliasConfig(x1_tags="random"))
    task = AliasTask(config)
    assert Counter(next(iter(own)) for own in tags(task).values()) == {"reliable": 15, "unreliable": 15}
    assert 0 < sum(tags(task)[i] == {"reliable"} for i in task.sets["DtQ1"]) < 15
