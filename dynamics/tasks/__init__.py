"""Tasks: synthetic data with contrasts. `load` rebuilds a run's task from its config."""

from dynamics.tasks.aliases import AliasTask as AliasTask
from dynamics.tasks.aliases import load as load
from dynamics.tasks.planting import planted as planted
from dynamics.tasks.planting import tag_blind as tag_blind
