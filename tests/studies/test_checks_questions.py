"""Each question of the ten checks beside the slow way."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

import dynamics as dy
from dynamics import measures, sites, steps
from dynamics.sites import Site
from dynamics.steps.states import restored_copy
from dynamics.studies import checks
from dynamics.tasks import AliasTask
from tests.zoo.checked_runs import (
    IMPULSE,
    N_ALIASES,
    WEAK,
    Seen,
    after,
    exchanged,
    gradient,
    logit,
    loss_of,
    made,
    necessity,
    sufficiency,
)


@pytest.mark.slow
@pytest.mark.parametrize("label", ["attn 0", "W_V L0H1"])
def test_sufficiency_puts_the_site_in_and_necessity_is_what_is_lost_without_it(runs, label, signs, texts):
    run = made(runs[0], label)
    checks._directions([run])
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


@pytest.mark.slow
def test_necessity_is_the_effect_on_reversed_contrasts_with_its_sign_turned(run, signs):
    checks._directions([run])
    turned = [c.reversed() for c in run.task.contrasts()]
    found = dy.patch_gradients(run.recipe, run.state, turned, [run.site], measures.correct_logit)
    np.testing.assert_allclose(signs.calls[0][1], -found["effect"].values[:, 0], rtol=0, atol=WEAK)


@pytest.mark.slow
def test_an_aliass_own_questions_are_held_against_those_of_the_alias_before_it(run, above):
    checks._own_questions([run])
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
    check = checks._own_questions([made(runs[0])])
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
        assert checks._own_questions(runs[:chosen]).verdict == "holds"
        assert checks._own_questions(less[:chosen]).verdict == "fails"


def held_by_chance(n_runs, n=200):
    """Of n populations of runs in which nothing moves anything, in how many the check holds."""
    rng = np.random.default_rng(n_runs)
    return sum(
        checks._own_questions([Pretended(*rng.normal(size=(2, 8))) for _ in range(n_runs)]).verdict == "holds"
        for _ in range(n)
    )


def test_in_one_run_nothing_moves_its_own_questions_more_by_chance_in_one_of_twenty_at_most():
    assert held_by_chance(1) < 0.05 * 200 + 3 * np.sqrt(0.05 * 0.95 * 200)


@pytest.mark.slow
def test_over_runs_nothing_moves_its_own_questions_more_by_chance_in_one_of_twenty_at_most():
    assert held_by_chance(12) < 0.05 * 200 + 3 * np.sqrt(0.05 * 0.95 * 200)


@pytest.mark.slow
def test_the_other_measures_are_of_the_same_steps(run, signs):
    check = checks._measures([run])
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


def norm(gradients):
    return float(torch.nn.utils.get_total_norm(list(gradients.values())))


@pytest.mark.slow
def test_the_source_is_scaled_until_both_gradients_have_one_norm(run, monkeypatch):
    seen = Seen(monkeypatch, "patch_gradients")
    checks._matched_norm([run])
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


@pytest.mark.slow
def test_the_matched_effect_is_that_of_a_scaled_gradient(run, signs):
    checks._matched_norm([run])
    ((plain, matched),) = signs.calls
    for i, contrast in enumerate(run.task.contrasts()[:3]):
        scale = norm(gradient(run, contrast.base)) / norm(gradient(run, contrast.source))
        assert plain[i] == pytest.approx(sufficiency(run, contrast, run.site.covers), abs=1e-10)
        assert matched[i] == pytest.approx(
            sufficiency(run, contrast, run.site.covers, scale=scale), abs=1e-10
        )
    assert (plain != matched).any()


def test_the_two_sets_are_told_apart(run, signs):
    checks._sets([run])
    (found,) = signs.calls
    for name, values in zip(("Dt3", "Df4"), found, strict=True):
        members = {c.coords["integer"]: c for c in run.task.contrasts()}
        expected = [sufficiency(run, members[i], run.site.covers) for i in run.task.sets[name]]
        np.testing.assert_allclose(values, expected, atol=1e-10)


def test_false_contents_say_another_aliass_value_under_both_tags_and_ask_as_before(run):
    task = run.task
    false, true = checks._false_contrasts(task), task.contrasts()
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


@pytest.mark.slow
def test_true_and_false_contents_are_exchanged_each_in_their_own_contrast(run, texts, above):
    check = checks._contents([run])
    true, false = (values for (values,) in texts.calls)
    covers = run.site.covers
    expected = [
        np.array([sufficiency(run, c, covers) for c in which[:3]])
        for which in (run.task.contrasts(), checks._false_contrasts(run.task))
    ]
    np.testing.assert_allclose(true[:3], expected[0], atol=1e-10)
    np.testing.assert_allclose(false[:3], expected[1], atol=1e-10)
    np.testing.assert_allclose(above.calls[0][0], np.sign(true.mean()) * (true - false), atol=1e-15)
    whole = {}
    model, _, _ = restored_copy(run.recipe, run.state)
    for content, which in (("true", run.task.contrasts()), ("false", checks._false_contrasts(run.task))):
        for tag, side in (("unreliable", "base"), ("reliable", "source")):
            changes = [
                logit(after(run, gradient(run, getattr(c, side)))[0], c.probe) - logit(model, c.probe)
                for c in which
            ]
            whole[f"{tag} {content}"] = f"{np.mean(changes):+.2f}"
    for name, value in whole.items():
        assert f"{name} {value}" in check.figure


@pytest.mark.slow
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
    check = checks._placebo([run])
    quantile = np.quantile(sizes[1:], 0.95, method="weibull")
    assert check.figure == f"|effect| {sizes[0]:.3f} against {quantile:.3f} logit, 20 placebos"
    assert check.verdict == ("holds" if sizes[0] > quantile else "fails")


def test_a_site_of_more_than_half_of_all_change_has_no_placebo_and_stays_open(runs):
    check = checks._placebo([made(runs[0], "+ unembedding")])
    assert (check.verdict, check.figure) == ("open", "no placebo: the site holds over half of ‖Δ‖², or none")


@pytest.mark.slow
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

    monkeypatch.setattr(checks, "patch_updates", pretended)
    check = checks._placebo([made(runs[0]) for _ in own])
    assert check.verdict == verdict
    assert check.figure == f"|effect| {np.mean(np.abs(own)):.3f} against 19.950 logit, 20 placebos"


@pytest.mark.slow
def test_the_impulse_is_one_definition_in_the_real_batch_and_the_run_goes_on_after_it(
    run, texts, signs, noise
):
    checks._impulse([run])
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


@pytest.mark.slow
def test_the_noise_floor_is_how_far_noise_takes_the_mean_response_of_a_run(runs, texts, noise):
    """±rms over draws and runs; the aliases' mean is taken first."""
    figure = checks._impulse([made(runs[0])]).figure
    mean = texts.calls[1][0].mean()
    assert float(figure.partition("±")[2]) == pytest.approx(
        np.sqrt(np.mean((noise.mean(1) - mean) ** 2)), abs=6e-4
    )


@pytest.mark.slow
def test_the_impulse_takes_the_runs_own_optimizer_whichever_the_single_step_takes(runs, texts, noise):
    for which in ("fresh", "stored"):
        checks._impulse([made(runs[0], optimizer=which)])
    (one,), (later,), (again,), (later_again,) = texts.calls
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(later, later_again)


def test_the_tags_are_counted_measured_and_their_definitions_losses_told(run):
    check = checks._tags([run])
    task, parts = run.task, []
    model, _, _ = restored_copy(run.recipe, run.state)
    for tag, side in (("reliable", "source"), ("unreliable", "base")):
        token = getattr(task, tag)
        n = sum(row[0] == token for row in task.rows("x1").tokens.tolist())
        size = float(np.linalg.norm(run.stored.parameters["embed.W_E"][token].numpy()))
        losses = [loss_of(model, getattr(c, side)).item() for c in task.contrasts()]
        parts.append(
            f"{tag}: {n} rows in X1, ‖embedding‖ {size:.2f}, definition loss {np.mean(losses):.2f} nat"
        )
        assert n == 6  # two integers of a set, three copies each
    assert check.figure == "; ".join(parts)
    assert check.verdict == "-"


def unseen(run):
    return torch.tensor([run.task.alias(i) for name in ("Dt3", "Df4") for i in run.task.sets[name]])


def test_exactly_those_rows_carry_all_of_their_own_effect(runs):
    run = made(runs[0])
    run.__dict__["site"] = Site("these rows", {"embed.W_E": (unseen(run),)})
    assert checks._unseen_rows([run]).figure.startswith("carry 100% of the site's effect; ")


@pytest.mark.slow
@pytest.mark.parametrize("label", ["W_E", "+ block 0"])
def test_what_those_rows_carry_of_a_sites_effect_is_the_ratio_of_mean_effects(runs, label):
    run = made(runs[0], label)
    check = checks._unseen_rows([run])
    contrasts = run.task.contrasts()
    own = np.mean([sufficiency(run, c, run.site.covers) for c in contrasts])
    rows = np.mean([sufficiency(run, c, {"embed.W_E": (unseen(run),)}) for c in contrasts])
    assert check.figure.startswith(f"carry {rows / own:.0%} of the site's effect")
    assert (f"{rows / own:.0%}" == "100%") == (label == "W_E")  # no other row is asked about
    moments = run.stored.optimizer.state["embed.W_E"]["exp_avg_sq"]
    others = [i for i in range(len(moments)) if i not in unseen(run).tolist()]
    ratio = moments[unseen(run)].mean() / moments[others].mean()
    assert f"their second moment is {float(ratio):.1e} times the other rows'" in check.figure


@pytest.mark.slow
def test_before_x2_those_rows_have_no_second_moment(runs):
    check = checks._unseen_rows([made(runs[0], "W_E", x2_step=0)])
    moment = float(re.search(r"second moment is (\S+) times", check.figure)[1])
    assert moment < 1e-3
    later = checks._unseen_rows([made(runs[0], "W_E")])
    assert float(re.search(r"second moment is (\S+) times", later.figure)[1]) > moment


@pytest.mark.parametrize("label", ["attn 0", "L1H0", "W_U", "block 0"])
def test_a_site_without_embeddings_covers_none_of_those_rows(runs, label):
    check = checks._unseen_rows([made(runs[0], label)])
    assert (check.verdict, check.figure) == ("-", "the site covers none")


def test_those_rows_are_in_no_training_row_before_x2(run):
    rows = unseen(run)
    for phase in ("pretrain", "x1"):
        assert not torch.isin(run.task.rows(phase).tokens, rows).any()
    assert torch.isin(run.task.rows("x2").tokens, rows).any()
