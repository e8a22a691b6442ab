"""Training loops as people write them by hand: a recipe for each, which replays every step bit for bit."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dynamics as dy
from checkpoints import Checkpoint, Trajectory, TrajectoryWriter
from dynamics.recipe import ByNorm, RecipeError
from dynamics.steps.walking import walk
from tests.zoo.small_models import classifier, classifier_loss, points, same

SINGLE = torch.float32
N_STEPS = 50


def small(**changes: Any) -> nn.Module:
    """A classifier in single precision, where the last bit tells."""
    return classifier(dtype=SINGLE, **changes)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return points(step, dtype=SINGLE)


def decay_groups(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    """Decay for matrices alone, in an order of groups that is not the model's."""
    given = list(parameters)
    vectors, matrices = ([p for p in given if (p.ndim > 1) == several] for several in (False, True))
    return torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}],
        **{"lr": 0.01, **settings},
    )


def head_alone(parameters: Any) -> torch.optim.Optimizer:
    """What fine-tunes a part of a model without freezing the rest."""
    return torch.optim.AdamW(list(parameters)[-2:], lr=0.01)


def replayed_differences(
    recipe: dy.Recipe, states: Sequence[Checkpoint], batch_of: Callable[[int], Any] = batch
) -> dict[int, list[str]]:
    """By step, in what its replay differs from the next state; empty where all steps are the same bits."""
    found = {}
    for before, after in pairwise(states):
        replayed = dy.steps.replay(recipe, before, batch_of(before.step))
        if names := after.differences(replayed) + after.rng_differences(replayed):
            found[before.step] = names
    return found


# --- which gradients a clip counts ------------------------------------------------------------------------


def clipped_by_hand(make_optimizer: Any, over: str, n_steps: int) -> Iterator[Checkpoint]:
    """A bare loop that clips the model's parameters or its optimizer's."""
    model = small()
    optimizer = make_optimizer(model.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(n_steps):
        yield Checkpoint.capture(model, optimizer, step=step)
        model.zero_grad()
        classifier_loss(model, batch(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters() if over == "model" else held, 0.1)
        optimizer.step()
    yield Checkpoint.capture(model, optimizer, step=n_steps)


@pytest.mark.parametrize(
    ("make_optimizer", "over"),
    [
        (decay_groups, "model"),
        (head_alone, "optimizer"),
        pytest.param(decay_groups, "optimizer", marks=pytest.mark.slow),
        pytest.param(head_alone, "model", marks=pytest.mark.slow),
    ],
)
def test_a_clip_counts_what_the_loop_counts(make_optimizer, over):
    states = list(clipped_by_hand(make_optimizer, over, 100))
    other = {"model": "optimizer", "optimizer": "model"}[over]
    recipe = dy.Recipe(small(), classifier_loss, make_optimizer, clip=ByNorm(0.1, over))
    assert replayed_differences(recipe, states) == {}
    assert replayed_differences(replace(recipe, clip=ByNorm(0.1, other)), states[:31])


@pytest.mark.parametrize("over", ["model", "optimizer"])
@pytest.mark.parametrize("make_optimizer", [decay_groups, head_alone])
def test_given_gradients_are_clipped_over_the_same_parameters_one_by_one_at_once_and_on_end(
    make_optimizer, over
):
    recipe = dy.Recipe(classifier(), classifier_loss, make_optimizer, clip=ByNorm(0.1, over))
    state = Checkpoint.capture(recipe.model, make_optimizer(recipe.model.parameters()))
    for step, moved in enumerate(
        walk(recipe, state, lambda at: dy.steps.gradient(recipe, at, points(at.step)), 5)
    ):
        expected = dy.steps.replay(recipe, state, points(step))
        gradient = dy.steps.gradient(recipe, state, points(step)).gradients
        alone = dy.steps.step_from(recipe, state, gradient)
        (at_once,) = dy.steps.steps_from(recipe, state, [gradient])
        for found in (moved.parameters, alone, at_once):
            for name, tensor in expected.parameters.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-13)
        state = expected


@pytest.mark.parametrize("over", ["model", "optimizer"])
def test_steps_mix_element_by_element_where_no_counted_norm_can_reach_the_limit(over):
    recipe = dy.Recipe(classifier(), classifier_loss, head_alone)
    state = Checkpoint.capture(recipe.model, head_alone(recipe.model.parameters()))
    one, other = (dy.steps.gradient(recipe, state, points(seed)).gradients for seed in (0, 1))
    held = ("head.weight", "head.bias")
    norms = {
        "model": sum(float(g.square().sum()) for gs in (one, other) for g in gs.values()) ** 0.5,
        "optimizer": sum(float(gs[n].square().sum()) for gs in (one, other) for n in held) ** 0.5,
    }
    assert norms["model"] > 1.01 * norms["optimizer"]
    for limit, fits in ((1.001 * norms[over], True), (0.999 * norms[over], False)):
        clipped = replace(recipe, clip=ByNorm(limit, over))
        assert dy.steps.update.Steps(clipped, state).separable(one, other) == fits


def test_a_clip_over_anything_else_is_refused():
    with pytest.raises(RecipeError, match=r"over='group'.*expected 'model' .* or 'optimizer'"):
        ByNorm(1.0, over="group")


# --- loops --------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """What one iteration of a loop by hand may touch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None


def recorded(
    recipe: dy.Recipe,
    iteration: Callable[[Loop, int], None],
    n_steps: int = N_STEPS,
    scaler: torch.amp.GradScaler | None = None,
) -> list[Checkpoint]:
    """The states before each iteration of a loop written by hand, and after the last."""
    model = copy.deepcopy(recipe.model)
    loop = Loop(model, recipe.optimizer(model.parameters()), scaler)
    states = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in range(n_steps + 1):
            states.append(Checkpoint.capture(model, loop.optimizer, step=step, scaler=scaler))
            if step < n_steps:
                iteration(loop, step)
    return states


def verdicts(recipe, states, folder, batch_of=batch):
    with TrajectoryWriter.create(folder, {}) as writer:
        for state in states:
            writer.append(state)
    return list(dy.steps.verify(recipe, Trajectory.open(folder), batch_of))


def ordinary(loop: Loop, step: int) -> None:
    loop.optimizer.zero_grad()
    classifier_loss(loop.model, batch(step)).backward()
    loop.optimizer.step()


# --- the learning rate assigned at the top of every iteration -------------------------------------------------


def warmed_up(step: int) -> float:
    return 0.01 * min(1.0, (step + 1) / 20)


def assigned(loop: Loop, step: int) -> None:
    for group in loop.optimizer.param_groups:
        group["lr"] = warmed_up(step)
    ordinary(loop, step)


@pytest.mark.parametrize(
    "learning_rate",
    [
        pytest.param(warmed_up, id="a number"),
        pytest.param(lambda step: [warmed_up(step)] * 2, id="a list by group", marks=pytest.mark.slow),
        pytest.param(
            lambda step: dict.fromkeys((0, 1), warmed_up(step)), id="a dict by group", marks=pytest.mark.slow
        ),
    ],
)
def test_a_rate_assigned_before_every_step_is_replayed(learning_rate):
    recipe = dy.Recipe(small(), classifier_loss, decay_groups, learning_rate=learning_rate)
    states = recorded(recipe, assigned)
    assert replayed_differences(recipe, states) == {}
    without = replayed_differences(replace(recipe, learning_rate=None), states[:26])
    assert list(without) == list(range(20))  # while it still rises: the checkpoint has the last step's


def test_rates_reach_groups_by_name_and_every_way_of_taking_a_step():
    def named(parameters):
        optimizer = decay_groups(parameters)
        for group, name in zip(optimizer.param_groups, ("vectors", "matrices"), strict=True):
            group["name"] = name
        return optimizer

    def by_name(step):
        return {"matrices": 0.01 * (step + 1), "vectors": 0.0}

    recipe = dy.Recipe(classifier(), classifier_loss, named, learning_rate=by_name)
    state = Checkpoint.capture(recipe.model, named(recipe.model.parameters()), step=3)
    by_hand = state.with_settings(lr=[0.0, 0.04])
    expected = dy.steps.replay(replace(recipe, learning_rate=None), by_hand, points(3)).parameters
    gradient = dy.steps.gradient(recipe, state, points(3)).gradients
    (walked,) = walk(recipe, state, lambda at: dy.steps.gradient(recipe, at, points(3)), 1)
    for found in (
        dy.steps.replay(recipe, state, points(3)).parameters,
        dy.steps.step_from(recipe, state, gradient),
        *dy.steps.steps_from(recipe, state, [gradient]),
        walked.parameters,
    ):
        assert torch.equal(found["head.bias"], state.parameters["head.bias"])
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14)


def test_rates_that_are_not_one_for_each_group_are_refused():
    recipe = dy.Recipe(small(), classifier_loss, decay_groups, learning_rate=lambda step: [0.1])
    state = Checkpoint.capture(recipe.model, decay_groups(recipe.model.parameters()))
    with pytest.raises(
        RecipeError, match=r"learning_rate\(0\) gives \[0.1\], and the optimizer has 2 groups"
    ):
        dy.steps.replay(recipe, state, batch(0))
    with pytest.raises(RecipeError, match="scheduler= or learning_rate=, not both"):
        replace(recipe, scheduler=lambda optimizer: None)


# --- gradients zeroed, not dropped ----------------------------------------------------------------------------


class Branching(nn.Module):
    """Two branches used in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd = small(), small()

    def forward(self, x: Tensor, step: int) -> Tensor:
        return (self.odd if step % 2 else self.even)(x)


def branching_batch(step: int) -> tuple[Tensor, Tensor, int]:
    return *batch(step), step


def branching_loss(model: nn.Module, batch: tuple[Tensor, Tensor, int]) -> Tensor:
    x, y, step = batch
    return nn.functional.cross_entropy(model(x, step), y)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize(
    "make_optimizer",
    [decay_groups, *(pytest.param(f, marks=pytest.mark.slow) for f in (momentum, plain_sgd))],
)
@pytest.mark.parametrize("unused", ["skip", "coast"])
def test_what_a_batch_does_not_use_is_skipped_or_coasts_as_in_the_loop(unused, make_optimizer):
    def iteration(loop, step):
        loop.optimizer.zero_grad(set_to_none=unused == "skip")
        branching_loss(loop.model, branching_batch(step)).backward()
        loop.optimizer.step()

    recipe = dy.Recipe(Branching(), branching_loss, make_optimizer, unused=unused)
    states = recorded(recipe, iteration)
    if (
        make_optimizer is plain_sgd
    ):  # which of its parameters had a gradient, it does not say: all from step 1 on
        states = states[2:]
    assert replayed_differences(recipe, states, branching_batch) == {}
    other = replace(recipe, unused={"skip": "coast", "coast": "skip"}[unused])
    assert len(replayed_differences(other, states[:21], branching_batch)) >= 20 - 2


def test_given_gradients_coast_as_the_loop_lets_them():
    recipe = dy.Recipe(Branching().double(), branching_loss, decay_groups, unused="coast")
    model = copy.deepcopy(recipe.model)
    state = Checkpoint.capture(model, decay_groups(model.parameters()))

    def double(step):
        return *points(step), step

    for moved in walk(recipe, state, lambda at: dy.steps.gradient(recipe, at, double(at.step)), 4):
        expected = dy.steps.replay(recipe, state, double(state.step))
        gradient = dy.steps.gradient(recipe, state, double(state.step)).gradients
        assert [name for name in ("even", "odd") if gradient[f"{name}.head.weight"] is None] == (
            ["odd"] if state.step == 0 else []
        )
        for found in (
            moved.parameters,
            dy.steps.step_from(recipe, state, gradient),
            *dy.steps.steps_from(recipe, state, [gradient]),
        ):
            for name, tensor in expected.parameters.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14)
        state = expected


# --- micro-batches --------------------------------------------------------------------------------------------


def micro_batches(step: int, n: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [points(10 * step + i, rows=4 + i, dtype=SINGLE) for i in range(n)]


def test_accumulated_gradients_are_replayed_with_their_dropout():
    def iteration(loop, step):
        for micro in micro_batches(step):
            (classifier_loss(loop.model, micro) / 3).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()

    recipe = dy.Recipe(small(dropout=0.3, norm=True), classifier_loss, decay_groups, accumulate=3)
    assert replayed_differences(recipe, recorded(recipe, iteration), micro_batches) == {}


def test_the_gradient_of_an_accumulated_step_is_the_mean_of_its_micro_batches():
    recipe = dy.Recipe(classifier(), classifier_loss, decay_groups, accumulate=2)
    state = Checkpoint.capture(recipe.model)
    both = [points(0), points(1, rows=3)]
    alone = [dy.steps.gradient(replace(recipe, accumulate=1), state, one) for one in both]
    found = dy.steps.gradient(recipe, state, both)
    assert float(found.loss) == pytest.approx(sum(float(one.loss) for one in alone) / 2, rel=1e-14)
    for name, g in found.gradients.items():
        mean = sum(one.gradients[name] for one in alone) / 2
        torch.testing.assert_close(g, mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("given", [points(0), [], [points(0)] * 3])
def test_a_step_of_micro_batches_takes_a_list_of_as_many(given):
    recipe = dy.Recipe(classifier(), classifier_loss, decay_groups, accumulate=2)
    with pytest.raises(RecipeError, match=r"accumulate=2 takes a list of that many micro-batches"):
        dy.steps.replay(recipe, Checkpoint.capture(recipe.model), given)


# --- modes ------------------------------------------------------------------------------------------------


def test_a_model_left_in_eval_mode_by_scoring_is_replayed_in_the_modes_it_trained_in():
    def iteration(loop, step):
        ordinary(loop, step)
        loop.model.train()
        if step % 10 == 4:
            loop.model.eval()
        if step % 10 == 7:
            loop.model.norm.eval()

    recipe = dy.Recipe(small(dropout=0.3, norm=True), classifier_loss, decay_groups)
    states = recorded(recipe, iteration)
    recipe.model.eval()
    assert replayed_differences(recipe, states) == {}
    assert not recipe.model.training
    forgotten = [replace(state, evaluating=None) for state in states]
    assert sorted(set(range(N_STEPS)) - replayed_differences(recipe, forgotten).keys()) == [5, 15, 25, 35, 45]


# --- float16, autocast, groups that join, an average beside the model -----------------------------------------


def half_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return classifier_loss(model, batch)


def bfloat_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return classifier_loss(model, batch)


def scaler() -> torch.amp.GradScaler:
    """One that begins so high that steps are skipped, and that grows often."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=5)


@pytest.mark.slow
def test_scaled_losses_and_skipped_steps_are_replayed():
    def iteration(loop, step):
        loop.optimizer.zero_grad()
        loop.scaler.scale(half_loss(loop.model, batch(step))).backward()
        loop.scaler.unscale_(loop.optimizer)
        nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()

    recipe = dy.Recipe(small(), half_loss, decay_groups, scaler=scaler, max_grad_norm=0.1)
    states = recorded(recipe, iteration, scaler=scaler())
    scales = [state.scaler["scale"] for state in states]
    assert {later / earlier for earlier, later in pairwise(scales)} == {0.5, 1.0, 2.0}
    assert replayed_differences(recipe, states) == {}
    skipped = [i for i, (a, b) in enumerate(pairwise(states)) if same(a.parameters, b.parameters)]
    assert skipped == [i for i, (a, b) in enumerate(pairwise(scales)) if b < a]
    assert replayed_differences(replace(recipe, scaler=None), states).keys() >= set(skipped)


def test_autocast_is_replayed():
    def iteration(loop, step):
        loop.optimizer.zero_grad()
        bfloat_loss(loop.model, batch(step)).backward()
        loop.optimizer.step()

    recipe = dy.Recipe(small(dropout=0.3), bfloat_loss, decay_groups)
    states = recorded(recipe, iteration)
    assert replayed_differences(recipe, states) == {}
    assert len(replayed_differences(replace(recipe, loss=classifier_loss), states)) == N_STEPS


def test_each_stretch_before_and_after_a_group_joins_replays_with_the_optimizer_it_had():
    def without_head(parameters):
        return torch.optim.AdamW(list(parameters)[:-2], lr=0.01)

    def with_head(parameters):
        optimizer = without_head(given := list(parameters))
        optimizer.add_param_group({"params": given[-2:], "lr": 0.02})
        return optimizer

    def iteration(loop, step):
        ordinary(loop, step)
        if step == 24:
            head = list(loop.model.parameters())[-2:]
            loop.optimizer.add_param_group({"params": head, "lr": 0.02})

    before = dy.Recipe(small(), classifier_loss, without_head)
    states = recorded(before, iteration)
    assert replayed_differences(before, states[:25]) == {}
    assert replayed_differences(replace(before, optimizer=with_head), states[25:]) == {}
    moved = dy.steps.replay(before, states[24], batch(24))
    assert states[25].differences(moved) == ["optimizer/groups"]
    with pytest.raises(ValueError, match="The checkpoint has 2 parameter groups, the optimizer 1"):
        dy.steps.replay(before, states[25], batch(25))


def test_an_average_kept_beside_the_model_changes_no_replay_and_is_measured_as_a_model():
    averages = []

    def iteration(loop, step):
        if not averages:
            averages.append(AveragedModel(loop.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
        ordinary(loop, step)
        averages[0].update_parameters(loop.model)

    recipe = dy.Recipe(small(dropout=0.3), classifier_loss, decay_groups)
    states = recorded(recipe, iteration)
    assert replayed_differences(recipe, states) == {}
    average = Checkpoint.capture(averages[0].module, step=N_STEPS)
    by_hand = states[1].parameters["head.weight"]
    for state in states[2:]:
        by_hand = 0.9 * by_hand + 0.1 * state.parameters["head.weight"]
    torch.testing.assert_close(average.parameters["head.weight"], by_hand)
    assert average.parameters.keys() == states[-1].parameters.keys()


# --- which of the usual causes it is --------------------------------------------------------------------------


@pytest.mark.slow
def test_verifying_says_which_usual_cause_explains_a_mismatch(tmp_path):
    def clipped(loop, step):
        loop.optimizer.zero_grad()
        classifier_loss(loop.model, batch(step)).backward()
        nn.utils.clip_grad_norm_([p for g in loop.optimizer.param_groups for p in g["params"]], 0.1)
        loop.optimizer.step()

    def coasting(loop, step):
        loop.optimizer.zero_grad(set_to_none=False)
        branching_loss(loop.model, branching_batch(step)).backward()
        loop.optimizer.step()

    plain = dy.Recipe(small(dropout=0.3), classifier_loss, decay_groups)
    head = replace(plain, optimizer=head_alone, max_grad_norm=0.1, clip=None)
    branches = dy.Recipe(Branching(), branching_loss, decay_groups)
    forgotten = [replace(state, evaluating=None) for state in recorded(plain, ordinary, 3)]
    in_eval = replace(plain, model=copy.deepcopy(plain.model).eval())
    for name, recipe, states, batch_of, expected in (
        (
            "rate",
            plain,
            recorded(plain, assigned, 3),
            batch,
            "the learning rate was 0.001, as recorded after",
        ),
        (
            "clip",
            head,
            recorded(head, clipped, 3),
            batch,
            "clipping counted the optimizer's gradients: clip=",
        ),
        ("coast", branches, recorded(branches, coasting, 3)[1:], branching_batch, "unused='coast'"),
        ("mode", in_eval, forgotten, batch, "the model was in train mode"),
        (
            "order",
            plain,
            recorded(plain, ordinary, 3),
            lambda i: batch(i - 1),
            "batch was that of the step after",
        ),
        ("other", plain, recorded(plain, ordinary, 3), lambda i: batch(i + 50), None),
    ):
        found = verdicts(recipe, states, tmp_path / name, batch_of)
        different = [verdict for verdict in found if verdict.differences]
        assert different, name
        assert (expected is None) == (different[-1].cause is None), name
        assert expected is None or expected in different[-1].cause or name == "rate", name
    rate = [v.cause for v in verdicts(plain, recorded(plain, assigned, 3), tmp_path / "rates")]
    assert [cause.split(",")[0] for cause in rate] == [
        f"the learning rate was {warmed_up(step):.6g}" for step in range(3)
    ]


def test_a_run_that_replays_needs_no_cause_whether_captured_before_or_after_its_rate_is_assigned(tmp_path):
    recipe = dy.Recipe(small(), classifier_loss, decay_groups, learning_rate=warmed_up)
    states = recorded(recipe, assigned, 4)
    after = [state.with_settings(lr=warmed_up(state.step)) for state in states]
    for name, captured in (("before", states), ("after", after)):
        found = verdicts(recipe, captured, tmp_path / name)
        assert [(v.start, v.differences, v.cause) for v in found] == [(i, (), None) for i in range(4)]
