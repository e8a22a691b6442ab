"""Signals pulled back by one batched backward pass: they are those of a pass each, and that way is taken."""

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.steps import gradient
from dynamics.steps.caching import recorded
from dynamics.steps.pullbacks import alike, pullbacks
from dynamics.steps.states import starting_point
from dynamics.steps.taps import exchanging
from dynamics.steps.update import step_from
from tests.zoo.cases import first_quick
from tests.zoo.signal_models import RECIPES, TOYS, batch_of, begun, contrast_of, tolerance_of
from tests.zoo.small_models import trained, transformer_recipe

NAMES = [*TOYS, "MLP", "MLP relu dropout", "convolutions", "GPT-2", "Llama"]


def cut(recipe, batch, name):
    """Slices of a model's activations in runs of one submodule each."""
    if name in TOYS:
        return sites.activations(recipe.model, "blocks.*.attn.hook_[qz]", ("layer", "head", "pos"), batch)
    hook = {
        "MLP": "lower",
        "MLP relu dropout": "lower",
        "convolutions": "first",
        "GPT-2": "transformer.h.*.mlp",
        "Llama": "model.layers.*.mlp",
    }[name]
    if name in ("GPT-2", "Llama"):
        return sites.activations(recipe.model, hook, ("layer", "pos"), batch)
    return [sites.Site(f"row {i}", {hook: (i,)}) for i in range(4)]


@pytest.mark.parametrize("name", first_quick(NAMES, 3))
def test_signals_pulled_back_at_once_are_those_of_a_backward_pass_each(name):
    recipe = RECIPES[name]()
    state, pair = begun(recipe, name).last, contrast_of(name)
    chosen = cut(recipe, pair.base, name)
    hooks = list(dict.fromkeys(hook for site in chosen for hook in site.covers))
    _, source = recorded(recipe, state, pair.source, hooks)
    kept = pullbacks(recipe, state, pair.base, hooks)
    for hook in hooks:
        ours = [site for site in chosen if hook in site.covers]
        assert len(ours) > 1
        assert all(kept.takes(site, source) for site in ours)
        found = kept.exchanging(ours, source)
        by_itself = kept.exchanging(ours[-1:], source)
        assert found is not None
        assert by_itself is not None
        assert alike(by_itself[0].gradients, found[-1].gradients)
        for site, step in zip(ours, found, strict=True):
            slow = gradient(recipe, state, pair.base, taps=exchanging(site, source, "base")).gradients
            size = max(float(g.abs().max()) for g in slow.values() if g is not None)
            for parameter, g in slow.items():
                if g is None:
                    assert step.gradients[parameter] is None
                else:
                    apart = float((step.gradients[parameter] - g).abs().max())
                    assert apart <= tolerance_of(name) * size, (site.label, parameter)
        assert not alike(found[0].gradients, found[1].gradients)


def test_a_pass_for_each_activation_is_taken_and_none_for_each_site():
    """Two runs, a check of each of two activations, and measures in stacks."""
    recipe = transformer_recipe(model=RECIPES["LN gelu"]().model)
    checkpoint = trained(recipe, [batch_of("LN gelu", 0)]).last
    pair = contrast_of("LN gelu")
    chosen = sites.activations(recipe.model, "blocks.*.attn.hook_z", ("layer", "head", "pos"), pair.base)
    calls = []
    recipe.model.register_forward_hook(lambda *_: calls.append(1))
    dy.patch_signals(recipe, checkpoint, [pair], chosen, dy.measures.correct_logit)
    stacks = 1 + 1 + -(-len(chosen) // 16)  # the references, the check of measuring at once, the sites
    assert len(chosen) >= 16
    assert len(calls) == 2 + 2 + stacks


class Added(nn.Module):
    """Two parameters that are added before they are used: autograd gives both one and the same gradient."""

    def __init__(self):
        super().__init__()
        self.lower = nn.Linear(3, 3)
        self.weight, self.change = (nn.Parameter(torch.randn(3, 3)) for _ in range(2))

    def forward(self, x):
        return self.lower(x @ (self.weight + self.change)).tanh()


@pytest.mark.parametrize("n_bytes", [1, 2**27])
def test_parameters_that_share_their_gradient_are_each_exchanged_once(n_bytes):
    torch.manual_seed(0)
    recipe = dy.Recipe(
        Added().double(), loss=lambda model, batch: model(batch).square().sum(), optimizer=torch.optim.SGD
    )
    base, source = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    chosen = [sites.Site(f"row {i}", {"lower": (i,)}) for i in range(4)]
    _, cache = recorded(recipe, starting_point(recipe, None), source, ["lower"])
    expected = []
    for site in chosen:
        step = gradient(recipe, starting_point(recipe, None), base, taps=exchanging(site, cache, "base"))
        after = step_from(recipe, starting_point(recipe, None), step.gradients)
        expected.append(float(after["weight"].sum() + 2 * after["change"].sum()))

    def measure(model, batch):
        return model.weight.sum() + 2 * model.change.sum()

    with dy.max_memory(n_bytes):
        found = dy.patch_signals(recipe, None, [dy.Contrast(base, source, base)], chosen, measure)
    assert len({round(value, 9) for value in expected}) == len(chosen)
    assert found.patched.values[0] == pytest.approx(expected, abs=1e-12)


def test_gradients_are_alike_to_rounding_and_no_further():
    ours = {"a": torch.ones(4, dtype=torch.float64), "b": None}
    assert alike(ours, {"a": ours["a"] + 1e-13, "b": None})
    assert not alike(ours, {"a": ours["a"] + 1e-9, "b": None})
    assert not alike(ours, {"a": None, "b": None})
    assert not alike(ours, {"a": ours["a"], "b": torch.zeros(4, dtype=torch.float64)})
