"""A config of aliases and a training loop of one's own, both as small as can be."""

import torch

from dynamics.config import AliasConfig, PhaseConfig, PhasesConfig, StudyConfig, ToyConfig

ALIASES = StudyConfig(
    task=AliasConfig(modulus=8, multipliers=(2, 3, 4), train_multipliers=2),
    model=ToyConfig(n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=8),
    phases=PhasesConfig(pretrain=PhaseConfig(3), x1=PhaseConfig(4), x2=PhaseConfig(500)),
    seed=3,
)
BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def squared_error(model, batch):
    """The loss of the loop of one's own."""
    return (model(batch) - batch.sum(-1, keepdim=True)).square().mean()
