"""The verbs of activations beside TransformerLens's own on toys that have learnt their language."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformer_lens.tools.analysis.attribution_patching import attribution_patch

import dynamics as dy
from dynamics import measures
from dynamics.config import AcronymsRun, FactsRun, ToyConfig
from dynamics.config.languages import (
    AcronymsConfig,
    FactsConfig,
    LatePhasesConfig,
    OnePhaseConfig,
)
from dynamics.config.parts import PhaseConfig
from dynamics.tasks import AcronymsTask, FactsTask
from tests.patching.test_activations import STACKED, SWEEPS, everywhere, ours, theirs

pytestmark = pytest.mark.slow

SMALL = {"n_layers": 2, "n_heads": 2, "d_model": 32, "d_head": 16, "d_mlp": 64, "dtype": "float64"}
QUICK = PhaseConfig(steps=120, warmup=20, learning_rate=5e-3)
TASKS = {
    "facts": lambda: FactsTask(
        FactsRun(
            task=FactsConfig(n_subjects=12, n_late=2),
            model=ToyConfig(**SMALL, n_ctx=5),
            phases=LatePhasesConfig(learn=QUICK),
        )
    ),
    "acronyms": lambda: AcronymsTask(
        AcronymsRun(
            task=AcronymsConfig(n_words=2, n_prompts=2000),
            model=ToyConfig(**SMALL, n_ctx=7),
            phases=OnePhaseConfig(learn=QUICK),
        )
    ),
}


@pytest.fixture(scope="module", params=TASKS)
def learnt(request, made_once):
    """A task, and a toy that has learnt it."""
    task = TASKS[request.param]()
    folder = made_once(f"toy-{request.param}", partial(train, task))
    model = task.model()
    model.load_state_dict(torch.load(folder / "toy.pt"))
    return task, model.eval().requires_grad_(False)


def train(task, folder):
    """Keeps the weights of a toy that has learnt a task."""
    recipe = task.recipe()
    model = recipe.model
    optimizer = recipe.build_optimizer(model.parameters())
    scheduler = recipe.build_scheduler(optimizer)
    for step in range(task.config.phases.learn.steps):
        optimizer.zero_grad()
        recipe.loss(model, task.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    folder.mkdir()
    torch.save(model.state_dict(), folder / "toy.pt")


@pytest.fixture(scope="module")
def contrasts(learnt):
    task, _ = learnt
    return [replace(c, probe=None) for c in task.contrasts()[:3]]


def test_the_behaviour_is_there_and_a_corruption_destroys_it(learnt, contrasts):
    task, model = learnt
    with torch.no_grad():
        assert measures.accuracy(model, task.evaluation["heldout"]).mean() > 0.95
        for contrast in contrasts:
            assert measures.accuracy(model, contrast.source).mean() == 1
            assert measures.accuracy(model, contrast.base).mean() < 0.5


@pytest.mark.parametrize("family", SWEEPS)
def test_every_sweep_is_transformer_lenss(learnt, contrasts, family):
    _, model = learnt
    like = contrasts[0].base
    found = ours(model, contrasts, family, like=like)
    expected = theirs(model, contrasts, family)
    assert found.shape == expected.shape
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # theirs is stored in fp32


def test_every_family_is_among_them():
    assert {part for parts in STACKED.values() for part in parts} < set(SWEEPS)


def test_node_attribution_is_transformer_lenss(learnt, contrasts):
    _, model = learnt
    scored = int(contrasts[0].base.target_pos[0])
    answer = int(contrasts[0].base.targets[0])

    def logit(model, batch):
        return model(batch.tokens)[:, scored, answer]

    pairs = [replace(c, base=c.base[:1], source=c.source[:1]) for c in contrasts]
    like = pairs[0].base
    chosen = [
        *everywhere(model, "hook_embed", "pos", batch=like),
        *everywhere(model, "blocks.*.attn.hook_z", "layer", "pos", "head", batch=like),
        *everywhere(model, "blocks.*.hook_mlp_out", "layer", "pos", batch=like),
    ]
    found = dy.attribute_activations(dy.Recipe(model), None, pairs, chosen, logit)["attribution"].mean(
        "example"
    )
    clean, corrupt = (torch.cat([getattr(c, side).tokens for c in pairs]) for side in ("source", "base"))
    twin = copy.deepcopy(model).requires_grad_(True)
    nodes = attribution_patch(twin, clean, corrupt, lambda z: z[0, scored, answer]).node_scores
    assert len(nodes) == found.sizes["site"]
    assert max(map(abs, nodes.values())) > 0.1
    for node, score in nodes.items():
        kind = {"embed": "embed", "attn_head_out": "attn.z", "mlp_out": "mlp_out"}[node.kind]
        where = (found["component"] == kind) & (found["pos"] == node.position)
        where &= found["layer"] == (-1 if node.layer is None else node.layer)
        where &= found["head"] == (-1 if node.head is None else node.head)
        assert found.values[where.values].item() == pytest.approx(score, abs=1e-5), node


def test_integrated_attributions_divide_what_the_whole_hook_does(learnt, contrasts):
    _, model = learnt
    cut = everywhere(model, "blocks.*.attn.hook_z", "layer", "head", batch=contrasts[0].base)
    whole = everywhere(model, "blocks.*.attn.hook_z", "layer", batch=contrasts[0].base)
    call = dy.Recipe(model), None, contrasts
    parts = dy.attribute_activations(*call, cut, measures.correct_logit, "integrated")
    effect = dy.patch_activations(*call, whole, measures.correct_logit)["effect"]
    missed = parts["attribution"].groupby("layer").sum().values - effect.values
    assert abs(effect).max() > 1
    np.testing.assert_allclose(abs(missed).max(-1), abs(parts["residual"]), rtol=0, atol=1e-9)
    assert abs(parts["residual"]).max() < 0.05 * abs(effect).max()
