"""How many models are stacked at a time changes how long a verb takes, and nothing else."""

import contextlib
import weakref
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.engine import gradient_prefetch, mixtures, runs, stack_memory
from dynamics.engine.measuring import Measuring
from dynamics.patching import signals
from dynamics.steps import update
from dynamics.steps.stacks import Stack
from dynamics.steps.states import starting_point
from dynamics.steps.update import Steps, step_from
from tests.zoo.small_models import (
    ADAMW,
    OPTIMIZERS,
    perturbed,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)

CONTRASTS = [dy.Contrast(tokens(i), tokens(i + 10), tokens(i + 20), {"example": f"{i}"}) for i in range(2)]
VERBS = {
    "patch_gradients": dy.patch_gradients,
    "patch_updates": dy.patch_updates,
    "patch_signals": dy.patch_signals,
}
every_verb = pytest.mark.parametrize("verb", VERBS)


def found_by(verb, recipe, checkpoint, measure=dy.measures.correct_logit):
    model = recipe.model
    if verb == "patch_signals":
        chosen = sites.activations(model, "blocks.*.attn.hook_z", ("layer", "head"), CONTRASTS[0].base)
    else:
        chosen = sites.parameters(model)
    return VERBS[verb](recipe, checkpoint, CONTRASTS, chosen, measure)


def counted(recipe, function):
    """What the function gives, and how often it calls the model."""
    calls = []
    handle = recipe.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        return function(), len(calls)
    finally:
        handle.remove()


@pytest.mark.slow
@every_verb
def test_under_any_budget_a_verb_finds_the_same_to_rounding(verb):
    recipe = transformer_recipe()
    checkpoint = trained(recipe, [tokens(i) for i in range(3)]).last
    usual, calls = counted(recipe, lambda: found_by(verb, recipe, checkpoint))
    for n_bytes, compare in ((1, "__gt__"), (2**34, "__le__")):
        with dy.max_memory(n_bytes):
            other, n = counted(recipe, lambda: found_by(verb, recipe, checkpoint))
        assert getattr(n, compare)(calls), (n, calls)
        for name in usual.data_vars:
            assert float(abs(other[name] - usual[name]).max()) < 1e-12, (n_bytes, name)


@pytest.mark.slow
@every_verb
def test_under_one_budget_a_verb_finds_the_same_bits(verb):
    recipe = transformer_recipe()
    checkpoint = trained(recipe, [tokens(0)]).last
    with dy.max_memory(10_000):
        one, other = (found_by(verb, recipe, checkpoint).drop_attrs() for _ in range(2))
    assert one.identical(other)


def test_a_budget_ends_where_its_block_ends_also_by_an_error():
    recipe = transformer_recipe()

    def n_calls():
        return counted(recipe, lambda: found_by("patch_updates", recipe, None))[1]

    usual = n_calls()
    with dy.max_memory(1):
        assert n_calls() > usual
    with contextlib.suppress(KeyError), dy.max_memory(1):
        raise KeyError
    assert n_calls() == usual


@pytest.mark.parametrize("n_bytes", [0, -1])
def test_a_budget_of_nothing_is_refused(n_bytes):
    with pytest.raises(ValueError, match="above 0"), dy.max_memory(n_bytes):
        pass


def test_stacks_take_half_of_what_is_free_and_of_much_memory_64_mib(monkeypatch):
    kilobyte = torch.zeros(256)
    for available, n in ((8 * 2**10, 4), (2**10, 1), (0, 1), (2**40, stack_memory.MAX_STACKED)):
        stack_memory._half_of_free_at_first.cache_clear()
        monkeypatch.setattr(psutil, "virtual_memory", lambda a=available: SimpleNamespace(available=a))
        assert stack_memory.models_per_stack([kilobyte]) == n
        with dy.max_memory(3 * 2**10):
            assert stack_memory.models_per_stack([kilobyte]) == 3
    assert stack_memory.models_per_stack([torch.zeros(2**18)] * 8) == 8  # 8 MiB each
    assert stack_memory.models_per_stack([torch.zeros(2**18)] * 8, stack_memory.HALF) == 4
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    assert (
        stack_memory.models_per_stack([kilobyte]) == stack_memory.MAX_STACKED
    )  # the same as before, in this process
    stack_memory._half_of_free_at_first.cache_clear()


def test_on_a_gpu_they_take_half_of_what_is_free_now_and_what_torch_keeps_counts_as_free(monkeypatch):
    free = [8000]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 10**6))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    tensor = SimpleNamespace(nbytes=1000, device=torch.device("cuda"))
    assert stack_memory.models_per_stack([tensor]) == 5
    free[0] = 2000
    assert stack_memory.models_per_stack([tensor]) == 2


@pytest.mark.parametrize(("numel", "given"), [(2**22, [0]), (2**22 - 1, [])])
def test_freed_memory_is_given_back_where_the_model_is_large(numel, given, monkeypatch):
    trimmed = []
    monkeypatch.setattr(stack_memory, "_C_LIBRARY", SimpleNamespace(malloc_trim=trimmed.append))
    stack_memory.trim_freed_memory({"a": torch.empty(numel - 10), "b": torch.empty(10)})
    assert trimmed == given
    monkeypatch.setattr(stack_memory, "_C_LIBRARY", SimpleNamespace())  # another C library
    stack_memory.trim_freed_memory({"a": torch.empty(2**23)})


class Unstackable(nn.Module):
    """A transformer that vmap cannot take, or that does otherwise under it."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how = transformer(), how

    def forward(self, ids):
        weight = self.inner.unembed.W_U
        if self.how == "branches on a value":
            return self.inner(ids) * (2.0 if weight.sum() > -1e9 else 1.0)
        return self.inner(ids) + float(torch._C._functorch.is_batchedtensor(weight))


@pytest.mark.slow
@every_verb
@pytest.mark.parametrize(
    ("how", "n_bytes"),
    [
        pytest.param("branches on a value", 2**27, id="branches on a value, all stacked"),
        pytest.param("branches on a value", 40_000, id="branches on a value, references alone"),
        pytest.param("does otherwise under vmap", 2**27, id="does otherwise under vmap, all stacked"),
    ],
)
def test_a_model_that_cannot_be_stacked_is_measured_one_at_a_time(verb, how, n_bytes):
    """Also where the first models are too large to be stacked and later ones are not."""
    recipe = transformer_recipe(model=Unstackable(how))
    module = recipe.model
    chosen = (
        sites.activations(module, "inner.blocks.*.attn.hook_z", ("layer", "head"), CONTRASTS[0].base)
        if verb == "patch_signals"
        else sites.parameters(module)
    )
    with dy.max_memory(n_bytes):
        found = VERBS[verb](recipe, None, CONTRASTS, chosen, dy.measures.correct_logit)
    slow = VERBS[verb](
        recipe, None, CONTRASTS, chosen, lambda model, batch: dy.measures.correct_logit(model, batch)
    )
    for name in ("patched", "base", "source", "untouched", "coasted"):
        assert float(abs(found[name] - slow[name]).max()) < 1e-12, name


class Counting(nn.Module):
    """Counts its forward passes, and says so."""

    def __init__(self):
        super().__init__()
        self.inner = transformer()
        self.register_buffer("passes", torch.zeros((), dtype=torch.float64))

    def forward(self, ids):
        self.passes += 1
        return self.inner(ids) * self.passes


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["patch_gradients", "patch_updates", "attribute_step"])
def test_a_buffer_that_a_measure_writes_into_begins_anew_for_every_stack(verb):
    recipe = transformer_recipe(model=Counting())
    checkpoint = trained(recipe, [tokens(0)]).last
    before = checkpoint.buffers["passes"].clone()
    chosen, take = sites.parameters(recipe.model), getattr(dy, verb)
    found = take(recipe, checkpoint, CONTRASTS, chosen, dy.measures.correct_logit)
    assert torch.equal(checkpoint.buffers["passes"], before)
    assert torch.equal(recipe.model.passes, torch.zeros_like(before))
    slow = take(
        recipe, checkpoint, CONTRASTS, chosen, lambda model, batch: dy.measures.correct_logit(model, batch)
    )
    for name in slow.data_vars:
        assert float(abs(found[name] - slow[name]).max()) < 1e-12, name


def test_a_gradient_that_was_written_into_is_clipped_by_its_new_norm():
    recipe = transformer_recipe(max_grad_norm=0.1)
    checkpoint = trained(recipe, [tokens(0)]).last
    gradients = {n: torch.randn_like(p) for n, p in checkpoint.parameters.items()}
    steps = Steps(recipe, checkpoint)
    steps.take([gradients])
    for gradient in gradients.values():
        gradient.mul_(7).add_(0.1)
    (after,) = steps.take([gradients])
    expected = step_from(recipe, checkpoint, gradients)
    assert all(float((after[n] - t).abs().max()) < 1e-12 for n, t in expected.items())


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD"])
def test_a_step_has_the_same_bits_however_many_are_taken_beside_it(kind):
    """Of a tensor whose length is no multiple of anything; blocks are wider where fewer steps are taken."""
    optimizers = {
        "AdamW": ADAMW,
        "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1),
        "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    }

    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(300_007))

        def forward(self, x):
            return self.weight.square().sum() * x

    recipe = dy.Recipe(perturbed(Long()), lambda model, x: model(x), optimizers[kind], max_grad_norm=1.0)
    checkpoint = trained(recipe, [torch.tensor(1.0), torch.tensor(0.5)]).last
    many = [{"weight": torch.randn(300_007)} for _ in range(16)]
    expected = step_from(recipe, checkpoint, many[0])["weight"]
    for n in (1, 2, 3, 5, 8, 9, 16):
        assert torch.equal(Steps(recipe, checkpoint).take(many[:n])[0]["weight"], expected), n


@pytest.mark.slow
@pytest.mark.parametrize("n_bytes", [2**27, 20_000, 1])
def test_an_update_exchanged_with_itself_has_no_effect_at_all_in_single_precision(n_bytes):
    """Kernels round by what is stacked beside a model; the base model is in every stack."""
    recipe = transformer_recipe(model=transformer("float32", d_model=128, d_head=32, n_heads=4, d_mlp=256))
    batch = tokens(0, rows=9)
    same = dy.Contrast(batch, batch, tokens(1, rows=12))
    with dy.max_memory(n_bytes):
        found = dy.patch_updates(
            recipe, None, [same], sites.parameters(recipe.model), dy.measures.correct_log_prob
        )
    assert float(abs(found["effect"]).max()) == 0.0


def test_what_a_stack_rounds_otherwise_than_the_base_model_alone_is_taken_off_all(monkeypatch):
    recipe = transformer_recipe()
    measuring = Measuring(recipe, starting_point(recipe, None), {"m": dy.measures.correct_logit})
    monkeypatch.setattr(Measuring, "__call__", lambda self, models, probe: np.array([[1.0], [1.5], [1.0]]))
    found = measuring.variants_of(Stack(3, {}, {}), None, np.array([0.9]), {})
    np.testing.assert_array_equal(found, [[1.4], [0.9]])


def test_while_updates_are_exchanged_no_gradient_is_held(monkeypatch):
    held, found = [], []
    take = gradient_prefetch.gradient

    def remembered(*arguments):
        step = take(*arguments)
        held.extend(weakref.ref(g) for g in step.gradients.values())
        return step

    def measure(model, batch):
        found.append(sum(gradient() is not None for gradient in held))
        return dy.measures.correct_logit(model, batch)

    monkeypatch.setattr(gradient_prefetch, "gradient", remembered)
    recipe = transformer_recipe()
    dy.patch_updates(recipe, None, CONTRASTS[:1], sites.parameters(recipe.model), measure)
    assert found[0] > 0
    assert set(found[len(runs.REFERENCE_ORDER) :]) == {0}


def test_memory_is_given_back_around_both_gradients_and_before_updates_are_exchanged(monkeypatch):
    events = []
    take = gradient_prefetch.gradient
    monkeypatch.setattr(
        gradient_prefetch, "gradient", lambda *given: events.append("gradient") or take(*given)
    )
    for room in (runs, mixtures):
        monkeypatch.setattr(room, "trim_freed_memory", lambda parameters: events.append("given back"))
    variants_of = Measuring.variants_of
    monkeypatch.setattr(
        Measuring, "variants_of", lambda *given: events.append("exchanged") or variants_of(*given)
    )
    recipe = transformer_recipe()
    with dy.max_memory(1):
        dy.patch_updates(
            recipe, None, CONTRASTS[:1], sites.parameters(recipe.model)[:1], dy.measures.correct_logit
        )
    around = ["given back", "gradient", "given back"]
    without = ["given back"] * 2  # of the zero gradient, and of the base gradient again
    assert events == [*around, *without, *without, *around, "given back", "exchanged"]


@pytest.mark.parametrize("verb", ["patch_gradients", "patch_updates"])
def test_of_the_references_none_is_held_that_is_not_needed_later(verb, monkeypatch):
    """While one is made: of updates the base model, which is exchanged with the source model."""
    made, held = [], []
    begin = Steps.begin

    def remembered(self, many, space=None):
        held.append(sum(model() is not None for model in made))
        finish = begin(self, many, space)

        def finished():
            stack = finish()
            made.append(weakref.ref({**stack.shared, **stack.stacked}["unembed.W_U"]))
            return stack

        return finished

    monkeypatch.setattr(Steps, "begin", remembered)
    recipe = transformer_recipe()
    with dy.max_memory(1):
        VERBS[verb](
            recipe, None, CONTRASTS[:1], sites.parameters(recipe.model)[:1], dy.measures.correct_logit
        )
    untouched = 1  # the checkpoint's own
    assert held[1:4] == [untouched, untouched, untouched + (verb == "patch_updates")]


def test_while_signals_are_exchanged_the_source_gradient_is_not_held(monkeypatch):
    held, found = [], []
    record = signals.recorded

    def remembered(*arguments):
        step, cache = record(*arguments)
        held.extend(weakref.ref(g) for g in step.gradients.values())
        return step, cache

    def measure(model, batch):
        found.append(sum(gradient() is not None for gradient in held))
        return dy.measures.correct_logit(model, batch)

    monkeypatch.setattr(signals, "recorded", remembered)
    recipe = transformer_recipe()
    chosen = sites.activations(recipe.model, "blocks.*.attn.hook_z", ("layer",), CONTRASTS[0].base)
    dy.patch_signals(recipe, None, CONTRASTS[:1], chosen, measure)
    assert found[0] > 0
    assert set(found[len(runs.REFERENCE_ORDER) :]) == {0}


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if not n.endswith(("amsgrad", "maximize"))])
def test_steps_of_the_usual_optimizers_are_taken_together(name, monkeypatch):
    recipe = transformer_recipe(optimizer=OPTIMIZERS[name])
    checkpoint = trained(recipe, [tokens(0)]).last
    many = [{n: torch.randn_like(p) for n, p in checkpoint.parameters.items()} for _ in range(3)]
    expected = [step_from(recipe, checkpoint, gradients) for gradients in many]
    monkeypatch.delattr(update, "step_from")
    for after, slow in zip(Steps(recipe, checkpoint).take(many), expected, strict=True):
        assert all(float((after[n] - t).abs().max()) < 1e-12 for n, t in slow.items())
