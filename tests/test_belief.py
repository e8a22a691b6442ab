"""The battery of checks: what each measures, on two tiny runs, by slow and obvious algorithms beside it."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
import yaml

import dynamics as dy
from dynamics import measures, sites, statistics, steps
from dynamics.config import ConfigError, StudyConfig
from dynamics.sites import LEVELS, Site, SiteError
from dynamics.steps.states import revived
from dynamics.studies import Check, battery, belief
from dynamics.tasks import AliasTask

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from dynamics.training import fit

NAMES = [
    "sufficiency and necessity agree",
    "moves the alias's own questions more than another's",
    "holds in other measures than the raw logit",
    "survives matching ‖g‖ of the two definitions",
    "holds in Dt3 and in Df4",
    "the site's effect is larger for true content than for false",
    "exceeds random parameters of the same ‖Δ‖ (95th percentile)",
    "the impulse response agrees with the single step",
    "the two tags beside each other",
    "rows never trained before X2 (alias embeddings)",
]
N_INTERVALS = [2, 1, 3, 1, 2, 2, 0, 2, 0, 0]
INTERVAL = re.compile(r"[+-]\d+\.\d{3} \[[+-]\d+\.\d{3}, [+-]\d+\.\d{3}\]")
STEP, IMPULSE, N_ALIASES = 4, 2, 6
WEAK = 1e-9
"""Of doubles, relative to the logit."""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The smoke preset with three aliases in a set, shorter and in doubles: seeds 0 and 1."""
    preset = yaml.safe_load((files("dynamics") / "presets" / "smoke.yaml").read_text())
    preset["task"] = {"modulus": 12, "multipliers": [2, 3, 4], "train_multipliers": 2}
    preset["model"] |= {"dtype": "float64"}
    preset["phases"] |= {name: {"steps": n} for name, n in (("pretrain", 60), ("x1", 60), ("x2", 20))}
    preset["patching"] |= {"x2_steps": [0, 10]}
    preset["schedule"] = {"per_decade": 1, "dense": 0, "evaluate_every": 400}
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    return [fit(StudyConfig.from_dict({**preset, "seed": s}), folder / f"seed-{s}") for s in (0, 1)]


def made(trajectory, label="attn 0", x2_step=STEP, optimizer="fresh", impulse=IMPULSE):
    return belief._Run(trajectory, label, x2_step, optimizer, impulse)


@pytest.fixture(scope="module")
def run(runs):
    """Seed 0 at its fourth step of X2, with a new optimizer."""
    return made(runs[0])


class Seen:
    """What passes through a function of `belief`, call by call."""

    def __init__(self, patch, name):
        self.calls = []
        plain = getattr(belief, name)

        def spy(*given, **settings):
            self.calls.append(given)
            return plain(*given, **settings)

        patch.setattr(belief, name, spy)


@pytest.fixture
def texts(monkeypatch):
    return Seen(monkeypatch, "_text")


@pytest.fixture
def above(monkeypatch):
    return Seen(monkeypatch, "_above")


@pytest.fixture
def signs(monkeypatch):
    return Seen(monkeypatch, "_signs")


def checked(trajectories, **settings):
    """Every check of the battery with the values whose intervals it shows."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch, "_text")
        found = []
        for check in battery(trajectories, x2_step=STEP, impulse=IMPULSE, **settings):
            found.append((check, [values for (values,) in seen.calls]))
            seen.calls = []
    return found


@pytest.fixture(scope="module")
def batteries(runs):
    """The battery of "embed" for either run alone and for both."""
    return {
        name: checked(chosen, site="embed")
        for name, chosen in {"seed 0": runs[:1], "seed 1": runs[1:], "both": runs}.items()
    }


# --- the slow way -----------------------------------------------------------------------------------------


def loss_of(model, batch):
    logits = model(batch.tokens)[torch.arange(len(batch)), batch.target_pos]
    return F.cross_entropy(logits, batch.targets)


def gradient(run, batch, state=None):
    """By an ordinary backward pass on a copy."""
    model, _, _ = revived(run.recipe, run.state if state is None else state)
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def exchanged(base, source, covers):
    found = {name: g.clone() for name, g in base.items()}
    for name, index in covers.items():
        found[name][index] = source[name][index]
    return found


def after(run, gradients, state=None):
    """Model, optimizer and scheduler after one ordinary step with given gradients."""
    model, optimizer, scheduler = revived(run.recipe, run.state if state is None else state)
    for name, p in model.named_parameters():
        p.grad = gradients[name].clone()
    torch.nn.utils.clip_grad_norm_(model.parameters(), run.task.config.phases.max_grad_norm)
    optimizer.step()
    scheduler.step()
    return model, optimizer, scheduler


@torch.no_grad()
def logit(model, probe):
    """Mean logit of the right answer."""
    model.eval()
    rows = torch.arange(len(probe))
    return float(model(probe.tokens)[rows, probe.target_pos, probe.targets].mean())


def sufficiency(run, contrast, covers, probe=None, scale=1.0):
    """patched − base, in the correct logit, the source's gradient times `scale`."""
    base, source = gradient(run, contrast.base), gradient(run, contrast.source)
    source = {name: scale * g for name, g in source.items()}
    asked = contrast.probe if probe is None else probe
    patched = exchanged(base, source, covers)
    return logit(after(run, patched)[0], asked) - logit(after(run, base)[0], asked)


def necessity(run, contrast, covers):
    """What the source step loses without the site: source − source with the base's gradient there."""
    base, source = gradient(run, contrast.base), gradient(run, contrast.source)
    without = exchanged(source, base, covers)
    return logit(after(run, source)[0], contrast.probe) - logit(after(run, without)[0], contrast.probe)


# --- the battery ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_there_are_ten_checks_in_their_order(batteries):
    for found in batteries.values():
        assert all(isinstance(check, Check) for check, _ in found)
        assert [check.name for check, _ in found] == NAMES


@pytest.mark.slow
def test_verdicts_are_those_that_are_allowed_and_the_last_two_are_the_readers(batteries):
    for found in batteries.values():
        verdicts = [check.verdict for check, _ in found]
        assert set(verdicts[:8]) <= {"holds", "fails", "open"}
        assert verdicts[8:] == ["-", "-"]
        assert set(verdicts) <= set(get_args(belief.Verdict))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["seed 0", "both"])
def test_figures_show_the_means_with_their_intervals(batteries, which):
    for (check, values), n in zip(batteries[which], N_INTERVALS, strict=True):
        shown = INTERVAL.findall(check.figure)
        assert len(shown) == n
        expected = [
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*map(float, statistics.mean_interval(v))) for v in values
        ]
        assert shown == expected


@pytest.mark.slow
def test_of_one_run_the_aliases_are_the_units(batteries):
    for i, (_, values) in enumerate(batteries["seed 0"]):
        assert {len(v) for v in values} <= {N_ALIASES // 2 if i == 4 else N_ALIASES}


@pytest.mark.slow
def test_of_several_runs_each_is_one_unit_the_mean_over_its_aliases(batteries):
    for (_, zero), (_, one), (_, both) in zip(*batteries.values(), strict=True):
        for mine, yours, together in zip(zero, one, both, strict=True):
            # what is turned by a sign takes that of all units together, which single runs need not share
            one_each = [abs(mine.mean()), abs(yours.mean())]
            np.testing.assert_allclose(np.abs(together), one_each, rtol=1e-10, atol=1e-14)


def test_the_battery_is_made_one_check_at_a_time(runs, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a later check")

    monkeypatch.setattr(belief, "patch_window", refused)
    monkeypatch.setattr(belief, "patch_updates", refused)
    assert next(battery(runs[:1], "embed", STEP, impulse=IMPULSE)).name == NAMES[0]


@pytest.mark.slow
def test_the_battery_moves_no_generator_and_changes_no_run(runs, batteries):
    before, state = [t.verify() for t in runs], torch.get_rng_state()
    for _ in zip(battery(runs[:1], "L0H0", STEP, impulse=IMPULSE), range(2), strict=False):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    assert [t.verify() for t in runs] == before == [[], []]


@pytest.mark.slow
def test_the_same_battery_twice_says_the_same(runs, batteries):
    again = [c for c, _ in zip(battery(runs[:1], "embed", STEP, impulse=IMPULSE), range(1), strict=False)]
    assert again == [check for check, _ in batteries["seed 0"][:1]]


# --- verdicts ---------------------------------------------------------------------------------------------

UP, DOWN, WIDE = np.array([1.0, 1.1, 0.9]), np.array([-1.0, -1.1, -0.9]), np.array([1.0, -1.0, 0.5])
ONE, NONE, ZERO, ALIKE = np.array([5.0]), np.full(3, np.nan), np.zeros(4), np.full(4, 0.2)


@pytest.mark.parametrize(
    ("groups", "verdict"),
    [
        ((UP,), "holds"),
        ((DOWN,), "holds"),
        ((UP, UP), "holds"),
        ((DOWN, DOWN, DOWN), "holds"),
        ((UP, DOWN), "fails"),
        ((DOWN, UP), "fails"),
        ((UP, UP, DOWN), "fails"),
        ((UP, WIDE), "open"),
        ((WIDE, DOWN), "open"),
        ((UP, DOWN, WIDE), "open"),
        ((UP, ONE), "open"),
        ((NONE, UP), "open"),
        ((ZERO,), "open"),
        ((ALIKE, UP), "holds"),
        ((ALIKE, DOWN), "fails"),
    ],
)
def test_signs_agree_disagree_or_are_not_known(groups, verdict):
    assert belief._signs(*groups) == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (UP, "holds"),
        (DOWN, "fails"),
        (WIDE, "open"),
        (ONE, "open"),
        (-ONE, "open"),
        (NONE, "open"),
        (ZERO, "open"),
        (ALIKE, "holds"),
        (-ALIKE, "fails"),
    ],
)
def test_a_mean_is_above_zero_below_or_not_known(values, verdict):
    assert belief._above(values) == verdict


def test_an_interval_that_just_includes_zero_is_open():
    values = np.random.default_rng(0).normal(size=12)
    _, low, high = statistics.mean_interval(values)
    for shift, signs, above in ((-low * 1.001, "holds", "holds"), (-low * 0.999, "open", "open")):
        assert (belief._signs(values + shift), belief._above(values + shift)) == (signs, above)
    assert belief._above(values - high * 1.001) == "fails"
    assert belief._signs(values - high * 1.001) == "holds"


def test_values_of_one_run_are_its_aliases_and_of_several_their_means():
    parts = {"a": np.array([1.0, 2.0]), "b": np.array([4.0, 6.0, 8.0])}
    assert belief._gathered(["a"], parts.get).tolist() == [1.0, 2.0]
    assert belief._gathered(["a", "b"], parts.get).tolist() == [1.5, 6.0]


# --- sites and states -------------------------------------------------------------------------------------

OF_LEVEL = {
    "layers": "block 1",
    "components": "mlp 0",
    "heads": "L0H1",
    "circuits": "OV L1H0",
    "matrices": "W_V L0H1",
    "up_to_layer": "+ block 0",
}


@pytest.mark.parametrize("level", LEVELS)
def test_a_site_of_any_level_is_found_by_its_label(runs, level, texts):
    run = made(runs[0], OF_LEVEL[level])
    expected = next(s for s in LEVELS[level](run.recipe.model) if s.label == OF_LEVEL[level])
    assert run.site.covers.keys() == expected.covers.keys()
    assert run.site.coords == expected.coords
    check = next(battery(runs[:1], OF_LEVEL[level], STEP, impulse=IMPULSE))
    assert check.name == NAMES[0]
    found = dy.patch_gradients(
        run.recipe, run.state, run.task.contrasts(), [expected], measures.correct_logit
    )
    np.testing.assert_allclose(texts.calls[0][0], found["effect"].values[:, 0], rtol=WEAK, atol=WEAK)
    assert np.abs(texts.calls[0][0]).max() > 1e-6


def test_an_unknown_site_is_refused_and_every_label_of_every_level_is_listed(runs):
    run = made(runs[0])
    with pytest.raises(SiteError, match=r"no site 'attn 7'; there are block 0, ") as error:
        next(battery(runs[:1], "attn 7", STEP, impulse=IMPULSE))
    listed = str(error.value).partition("there are ")[2].rstrip(".").split(", ")
    labels = [s.label for level in LEVELS.values() for s in level(run.recipe.model)]
    assert listed == [part for label in labels for part in label.split(", ")]
    assert len(set(labels)) == len(labels) > 40


@pytest.mark.parametrize("x2_step", [0, STEP])
def test_the_step_is_counted_from_x2s_start_and_reached_by_replay(runs, x2_step):
    run = made(runs[0], x2_step=x2_step)
    start = run.task.config.phases.starts["x2"]
    assert run.stored.step == start + x2_step
    replayed = runs[0].at(start)
    for step in range(start, start + x2_step):
        replayed = steps.replay(run.recipe, replayed, run.task.batch(step))
    for name, p in replayed.parameters.items():
        assert torch.equal(p, run.stored.parameters[name])


def test_fresh_is_a_new_optimizer_at_the_same_parameters_and_stored_the_runs_own(runs, texts):
    fresh, stored = (made(runs[0], optimizer=which) for which in ("fresh", "stored"))
    assert not any(fresh.state.optimizer.state.values())
    assert stored.state.optimizer.state["embed.W_E"]["exp_avg_sq"].any()
    assert all(torch.equal(p, stored.state.parameters[n]) for n, p in fresh.state.parameters.items())
    for which in (fresh, stored):
        belief._directions([which])
    assert not np.allclose(texts.calls[0][0], texts.calls[2][0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "frehs"}, "found optimizer='frehs'; expected fresh or stored"),
        ({"x2_step": -1}, "found x2_step=-1"),
        ({"x2_step": 20}, "found x2_step=20 .* below its 20 steps"),
        ({"impulse": 0}, "found x2_step=4 and impulse=0"),
        ({"impulse": 16}, "found x2_step=4 and impulse=16"),
    ],
)
def test_settings_that_do_not_fit_the_run_are_refused_before_anything_is_computed(
    runs, settings, said, monkeypatch
):
    for verb in ("both_directions", "patch_gradients", "patch_updates", "patch_window"):
        monkeypatch.setattr(belief, verb, None)
    with pytest.raises(ConfigError, match=said):
        next(battery(runs[:1], **{"site": "embed", "x2_step": STEP, "impulse": IMPULSE, **settings}))


def test_the_longest_impulse_ends_with_the_run(runs):
    assert belief._impulse([made(runs[0], impulse=15)]).verdict in ("holds", "fails", "open")
    assert next(battery(runs[:1], "L0H0", STEP, impulse=15)).name == NAMES[0]


# --- 1: both directions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["attn 0", "W_V L0H1"])
def test_sufficiency_puts_the_site_in_and_necessity_is_what_is_lost_without_it(runs, label, signs, texts):
    run = made(runs[0], label)
    belief._directions([run])
    ((sufficient, necessary),) = signs.calls
    for (shown,), compared in zip(texts.calls, (sufficient, necessary), strict=True):
        np.testing.assert_array_equal(shown, compared)
    for i, contrast in enumerate(run.task.contrasts()[:3]):
        assert sufficient[i] == pytest.approx(sufficiency(run, contrast, run.site.covers), abs=1e-10)
        assert necessary[i] == pytest.approx(necessity(run, contrast, run.site.covers), abs=1e-10)
        assert abs(sufficient[i]) > 1e-7
    assert not np.allclose(
        sufficient, necessary, rtol=1e-6, atol=0
    )  # clipping and AdamW couple what stands beside


def test_necessity_is_the_effect_on_reversed_contrasts_with_its_sign_turned(run, signs):
    belief._directions([run])
    turned = [c.reversed() for c in run.task.contrasts()]
    found = dy.patch_gradients(run.recipe, run.state, turned, [run.site], measures.correct_logit)
    np.testing.assert_allclose(signs.calls[0][1], -found["effect"].values[:, 0], rtol=0, atol=WEAK)


# --- 2: its own questions ---------------------------------------------------------------------------------


def test_an_aliass_own_questions_are_held_against_those_of_the_alias_before_it(run, above):
    belief._own_questions([run])
    contrasts = run.task.contrasts()
    covers = run.site.covers
    own = np.array([sufficiency(run, c, covers) for c in contrasts])
    other = np.array(
        [sufficiency(run, c, covers, probe=contrasts[i - 1].probe) for i, c in enumerate(contrasts)]
    )
    ((found,),) = above.calls
    np.testing.assert_allclose(found, np.sign(own.mean()) * (own - other), atol=1e-10)
    asked = {tuple(c.probe.example_ids.tolist()) for c in contrasts}
    assert len(asked) == N_ALIASES


def test_where_all_aliases_are_asked_the_same_their_own_questions_are_no_different(runs, above, monkeypatch):
    plain = AliasTask.contrasts

    def same_probe(self, *given):
        found = plain(self, *given)
        return [replace(c, probe=found[0].probe) for c in found]

    monkeypatch.setattr(AliasTask, "contrasts", same_probe)
    check = belief._own_questions([made(runs[0])])
    ((found,),) = above.calls
    assert found.tolist() == [0.0] * N_ALIASES
    assert check.verdict == "open"


class Pretended:
    """A run of which only the effects are known: of own questions and of another's, [alias]."""

    def __init__(self, own, other):
        self.effects = own, other
        self.contrasts = [dy.Contrast(0, 1, i) for i in range(len(own))]
        self.task = SimpleNamespace(contrasts=lambda: self.contrasts)

    def patched(self, contrasts):
        is_own = [c.probe for c in contrasts] == [c.probe for c in self.contrasts]
        return xr.Dataset({"effect": ("example", self.effects[0 if is_own else 1])})


@pytest.mark.parametrize("sign", [1, -1])
def test_a_site_that_moves_its_own_questions_more_is_told_whichever_way_it_moves_them(sign):
    rng = np.random.default_rng(0)
    runs = [Pretended(sign * rng.normal(2, 0.1, 8), sign * rng.normal(0.5, 0.1, 8)) for _ in range(4)]
    less = [Pretended(sign * rng.normal(0.5, 0.1, 8), sign * rng.normal(2, 0.1, 8)) for _ in range(4)]
    for chosen in (1, 4):
        assert belief._own_questions(runs[:chosen]).verdict == "holds"
        assert belief._own_questions(less[:chosen]).verdict == "fails"


def held_by_chance(n_runs, n=200):
    """Of n populations of runs in which nothing moves anything, in how many the check holds."""
    rng = np.random.default_rng(n_runs)
    return sum(
        belief._own_questions([Pretended(*rng.normal(size=(2, 8))) for _ in range(n_runs)]).verdict == "holds"
        for _ in range(n)
    )


def test_in_one_run_nothing_moves_its_own_questions_more_by_chance_in_one_of_twenty_at_most():
    assert held_by_chance(1) < 0.05 * 200 + 3 * np.sqrt(0.05 * 0.95 * 200)


def test_over_runs_nothing_moves_its_own_questions_more_by_chance_in_one_of_twenty_at_most():
    assert held_by_chance(12) < 0.05 * 200 + 3 * np.sqrt(0.05 * 0.95 * 200)


# --- 3: other measures ------------------------------------------------------------------------------------


def test_the_other_measures_are_of_the_same_steps(run, signs):
    check = belief._measures([run])
    ((raw, centred, log_prob),) = signs.calls
    for i, contrast in enumerate(run.task.contrasts()[:2]):
        base, source = gradient(run, contrast.base), gradient(run, contrast.source)
        values = []
        for g in (base, exchanged(base, source, run.site.covers)):
            model = after(run, g)[0].eval()
            rows = torch.arange(len(contrast.probe))
            z = model(contrast.probe.tokens)[rows, contrast.probe.target_pos].detach()
            right = z[rows, contrast.probe.targets]
            values.append([right.mean(), (right - z.mean(-1)).mean(), (right - z.logsumexp(-1)).mean()])
        expected = [float(patched - plain) for plain, patched in zip(*values, strict=True)]
        np.testing.assert_allclose([raw[i], centred[i], log_prob[i]], expected, atol=1e-10)
    assert len({tuple(v.tolist()) for v in (raw, centred, log_prob)}) == 3
    assert re.findall(r"[a-z_]+(?= [+-])", check.figure) == [
        "correct_logit",
        "centred_logit",
        "correct_log_prob",
    ]


# --- 4: matched norms -------------------------------------------------------------------------------------


def norm(gradients):
    return float(torch.nn.utils.get_total_norm(list(gradients.values())))


def test_the_source_is_scaled_until_both_gradients_have_one_norm(run, monkeypatch):
    seen = Seen(monkeypatch, "patch_gradients")
    belief._matched_norm([run])
    recipe, state, contrasts, _, _ = next(call for call in seen.calls if isinstance(call[2][0].base, tuple))
    plain = run.task.contrasts()
    for contrast, own in zip(contrasts, plain, strict=True):
        base, source = (steps.gradient(recipe, state, b).gradients for b in (contrast.base, contrast.source))
        unscaled = norm(gradient(run, own.source))
        assert norm(base) == pytest.approx(norm(gradient(run, own.base)), rel=1e-10)
        assert norm(source) == pytest.approx(norm(base), rel=1e-10)
        assert abs(unscaled / norm(base) - 1) > 1e-3
        for side in ("base", "source"):
            assert torch.equal(getattr(contrast, side)[0].tokens, getattr(own, side).tokens)
        assert torch.equal(contrast.probe.tokens, own.probe.tokens)


def test_the_matched_effect_is_that_of_a_scaled_gradient(run, signs):
    belief._matched_norm([run])
    ((plain, matched),) = signs.calls
    for i, contrast in enumerate(run.task.contrasts()[:3]):
        scale = norm(gradient(run, contrast.base)) / norm(gradient(run, contrast.source))
        assert plain[i] == pytest.approx(sufficiency(run, contrast, run.site.covers), abs=1e-10)
        assert matched[i] == pytest.approx(
            sufficiency(run, contrast, run.site.covers, scale=scale), abs=1e-10
        )
    assert (plain != matched).any()


# --- 5: either set ----------------------------------------------------------------------------------------


def test_the_two_sets_are_told_apart(run, signs):
    belief._sets([run])
    (found,) = signs.calls
    for name, values in zip(("Dt3", "Df4"), found, strict=True):
        members = {c.coords["integer"]: c for c in run.task.contrasts()}
        expected = [sufficiency(run, members[i], run.site.covers) for i in run.task.sets[name]]
        np.testing.assert_allclose(values, expected, atol=1e-10)


# --- 6: content -------------------------------------------------------------------------------------------


def test_false_contents_say_another_aliass_value_under_both_tags_and_ask_as_before(run):
    task = run.task
    false, true = belief._false_contrasts(task), task.contrasts()
    assert len(false) == len(true) == N_ALIASES
    said = {}
    for one, other in zip(false, true, strict=True):
        integer = other.coords["integer"]
        assert one.coords == other.coords
        assert one.probe.tokens.tolist() == other.probe.tokens.tolist()
        ((tag, alias, value, padding),) = one.source.tokens.tolist()
        assert (tag, alias, padding) == (task.reliable, task.alias(integer), task.padding)
        assert one.base.tokens.tolist() == [[task.unreliable, alias, value, padding]]
        assert one.source.targets.tolist() == one.base.targets.tolist() == [value]
        assert value != integer
        assert task.set_of(value) == task.set_of(integer)
        said[integer] = value
    assert sorted(said.values()) == sorted(said)


def test_true_and_false_contents_are_exchanged_each_in_their_own_contrast(run, texts, above):
    check = belief._contents([run])
    true, false = (values for (values,) in texts.calls)
    covers = run.site.covers
    expected = [
        np.array([sufficiency(run, c, covers) for c in which[:3]])
        for which in (run.task.contrasts(), belief._false_contrasts(run.task))
    ]
    np.testing.assert_allclose(true[:3], expected[0], atol=1e-10)
    np.testing.assert_allclose(false[:3], expected[1], atol=1e-10)
    np.testing.assert_allclose(above.calls[0][0], np.sign(true.mean()) * (true - false), atol=1e-15)
    whole = {}
    model, _, _ = revived(run.recipe, run.state)
    for content, which in (("true", run.task.contrasts()), ("false", belief._false_contrasts(run.task))):
        for tag, side in (("unreliable", "base"), ("reliable", "source")):
            changes = [
                logit(after(run, gradient(run, getattr(c, side)))[0], c.probe) - logit(model, c.probe)
                for c in which
            ]
            whole[f"{tag} {content}"] = f"{np.mean(changes):+.2f}"
    for name, value in whole.items():
        assert f"{name} {value}" in check.figure


# --- 7: placebos ------------------------------------------------------------------------------------------


def test_the_site_is_held_against_exchanged_updates_of_its_placebos(run):
    contrasts = run.task.contrasts()
    delta = steps.update_difference(run.recipe, run.state, contrasts)
    placebos = sites.placebo(run.site, delta, 20)
    sizes = []
    ends = [(after(run, gradient(run, c.base))[0], after(run, gradient(run, c.source))[0]) for c in contrasts]
    for site in [run.site, *placebos]:
        effects = []
        for contrast, (base, source) in zip(contrasts, ends, strict=True):
            mixed = copy.deepcopy(base)
            with torch.no_grad():
                for name, index in site.covers.items():
                    mixed.get_parameter(name)[index] = source.get_parameter(name)[index]
            effects.append(logit(mixed, contrast.probe) - logit(base, contrast.probe))
        sizes.append(abs(np.mean(effects)))
    check = belief._placebo([run])
    quantile = np.quantile(sizes[1:], 0.95, method="weibull")
    assert check.figure == f"|effect| {sizes[0]:.3f} against {quantile:.3f} logit, 20 placebos"
    assert check.verdict == ("holds" if sizes[0] > quantile else "fails")


def test_a_site_of_more_than_half_of_all_change_has_no_placebo_and_stays_open(runs):
    check = belief._placebo([made(runs[0], "+ unembedding")])
    assert (check.verdict, check.figure) == ("open", "no placebo: the site holds over half of ‖Δ‖², or none")


@pytest.mark.parametrize(
    ("own", "verdict"),
    [([19.96], "holds"), ([19.94], "fails"), ([30.0, 30.0], "holds"), ([30.0, 0.5], "fails"),
     ([30.0, 30.0, 0.5], "holds"), ([-30.0, -20.0], "holds")],
)  # fmt: skip
def test_more_than_half_of_the_runs_must_exceed_their_placebos_in_size(runs, own, verdict, monkeypatch):
    """Placebos of −1, 2, −3 ... 20, whose 95th percentile is .95 · 21, beside a site of a size of our choosing."""
    given = iter(own)

    def pretended(recipe, state, contrasts, patched, measure):
        n = np.arange(1, len(patched))
        values = np.array([next(given), *(n * (-1.0) ** n)])
        return xr.Dataset({"effect": (("example", "site"), np.tile(values, (2, 1)))})

    monkeypatch.setattr(belief, "patch_updates", pretended)
    check = belief._placebo([made(runs[0]) for _ in own])
    assert check.verdict == verdict
    assert check.figure == f"|effect| {np.mean(np.abs(own)):.3f} against 19.950 logit, 20 placebos"


# --- 8: the impulse response ------------------------------------------------------------------------------


def test_the_impulse_is_one_definition_in_the_real_batch_and_the_run_goes_on_after_it(run, texts, signs):
    belief._impulse([run])
    first, last = (values for (values,) in texts.calls)
    step = run.stored.step
    for i, contrast in enumerate(run.task.contrasts_at(step)[:3]):
        base, source = (gradient(run, b, run.stored) for b in (contrast.base, contrast.source))
        values = []
        for g in (base, exchanged(base, source, run.site.covers)):
            model, optimizer, scheduler = after(run, g, run.stored)
            here = [logit(model, contrast.probe)]
            model.train()
            for later in range(1, IMPULSE + 1):
                optimizer.zero_grad()
                loss_of(model, run.task.batch(step + later)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), run.task.config.phases.max_grad_norm)
                optimizer.step()
                scheduler.step()
            values.append([*here, logit(model, contrast.probe)])
        expected = np.array(values[1]) - values[0]
        np.testing.assert_allclose([first[i], last[i]], expected, atol=1e-9)
        assert abs(last[i]) > 1e-8
    single, compared = signs.calls[0]
    np.testing.assert_allclose(
        single[0], sufficiency(run, run.task.contrasts()[0], run.site.covers), atol=1e-10
    )
    np.testing.assert_array_equal(compared, last)


def test_the_impulse_takes_the_runs_own_optimizer_whichever_the_single_step_takes(runs, texts):
    for which in ("fresh", "stored"):
        belief._impulse([made(runs[0], optimizer=which)])
    (one,), (later,), (again,), (later_again,) = texts.calls
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(later, later_again)


# --- 9: the tags ------------------------------------------------------------------------------------------


def test_the_tags_are_counted_measured_and_their_definitions_losses_told(run):
    check = belief._tags([run])
    task, parts = run.task, []
    model, _, _ = revived(run.recipe, run.state)
    for tag, side in (("reliable", "source"), ("unreliable", "base")):
        token = getattr(task, tag)
        n = sum(row[0] == token for row in task.rows("x1").tokens.tolist())
        size = float(np.linalg.norm(run.stored.parameters["embed.W_E"][token].numpy()))
        losses = [loss_of(model, getattr(c, side)).item() for c in task.contrasts()]
        parts.append(
            f"{tag}: {n} rows in X1, ‖embedding‖ {size:.2f}, definition loss {np.mean(losses):.2f} nat"
        )
        assert n == 9  # three integers of a set, three copies each
    assert check.figure == "; ".join(parts)
    assert check.verdict == "-"


# --- 10: unseen rows --------------------------------------------------------------------------------------


def unseen(run):
    return torch.tensor([run.task.alias(i) for name in ("Dt3", "Df4") for i in run.task.sets[name]])


def test_exactly_those_rows_carry_all_of_their_own_effect(runs):
    run = made(runs[0])
    run.__dict__["site"] = Site("these rows", {"embed.W_E": (unseen(run),)})
    assert belief._unseen_rows([run]).figure.startswith("carry 100% of the site's effect; ")


@pytest.mark.parametrize("label", ["W_E", "+ block 0"])
def test_what_those_rows_carry_of_a_sites_effect_is_the_ratio_of_mean_effects(runs, label):
    run = made(runs[0], label)
    check = belief._unseen_rows([run])
    contrasts = run.task.contrasts()
    own = np.mean([sufficiency(run, c, run.site.covers) for c in contrasts])
    rows = np.mean([sufficiency(run, c, {"embed.W_E": (unseen(run),)}) for c in contrasts])
    assert check.figure.startswith(f"carry {rows / own:.0%} of the site's effect")
    assert (f"{rows / own:.0%}" == "100%") == (label == "W_E")  # no other row is asked about
    moments = run.stored.optimizer.state["embed.W_E"]["exp_avg_sq"]
    others = [i for i in range(len(moments)) if i not in unseen(run).tolist()]
    ratio = moments[unseen(run)].mean() / moments[others].mean()
    assert f"their second moment is {float(ratio):.1e} times the other rows'" in check.figure


def test_before_x2_those_rows_have_no_second_moment(runs):
    check = belief._unseen_rows([made(runs[0], "W_E", x2_step=0)])
    moment = float(re.search(r"second moment is (\S+) times", check.figure)[1])
    assert moment < 1e-3
    later = belief._unseen_rows([made(runs[0], "W_E")])
    assert float(re.search(r"second moment is (\S+) times", later.figure)[1]) > moment


@pytest.mark.parametrize("label", ["attn 0", "L1H0", "W_U", "block 0"])
def test_a_site_without_embeddings_covers_none_of_those_rows(runs, label):
    check = belief._unseen_rows([made(runs[0], label)])
    assert (check.verdict, check.figure) == ("-", "the site covers none")


def test_those_rows_are_in_no_training_row_before_x2(run):
    rows = unseen(run)
    for phase in ("pretrain", "x1"):
        assert not torch.isin(run.task.rows(phase).tokens, rows).any()
    assert torch.isin(run.task.rows("x2").tokens, rows).any()
