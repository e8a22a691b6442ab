"""The setting of the ten checks: a run small enough to do everything the slow way."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from dynamics.steps.states import restored_copy
from dynamics.studies import checks, ten_checks

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
STEP, IMPULSE, N_ALIASES = 4, 2, 4
WEAK = 1e-9
"""Of doubles, relative to the logit."""


def made(trajectory, label="attn 0", x2_step=STEP, optimizer="fresh", impulse=IMPULSE):
    return checks._Run(trajectory, label, x2_step, optimizer, impulse)


class Seen:
    """What passes through a function of `checks`, call by call."""

    def __init__(self, patch, name):
        self.calls = []
        plain = getattr(checks, name)

        def spy(*given, **settings):
            self.calls.append(given)
            return plain(*given, **settings)

        patch.setattr(checks, name, spy)


def checked(trajectories, **settings):
    """Every check of the ten checks with the values whose intervals it shows."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch, "_text")
        found = []
        for check in ten_checks(trajectories, x2_step=STEP, impulse=IMPULSE, **settings):
            found.append((check, [values for (values,) in seen.calls]))
            seen.calls = []
    return found


def loss_of(model, batch):
    logits = model(batch.tokens)[torch.arange(len(batch)), batch.target_pos]
    return F.cross_entropy(logits, batch.targets)


def gradient(run, batch, state=None):
    """By an ordinary backward pass on a copy."""
    model, _, _ = restored_copy(run.recipe, run.state if state is None else state)
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
    model, optimizer, scheduler = restored_copy(run.recipe, run.state if state is None else state)
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
