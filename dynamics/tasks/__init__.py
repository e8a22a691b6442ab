"""Tasks: synthetic data with contrasts. `load` rebuilds a run's task from its config."""

from dynamics.tasks.aliases import AliasTask as AliasTask
from dynamics.tasks.aliases import load as load
