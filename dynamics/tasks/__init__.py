"""Tasks: synthetic data with contrasts. `load` rebuilds a run's task from its config."""

from dynamics.tasks.aliases import AliasTask as AliasTask
from dynamics.tasks.aliases import load as load
from dynamics.tasks.planting import planted as planted
from dynamics.tasks.planting import tag_blind as tag_blind
from dynamics.tasks.probes import alias_questions as alias_questions
from dynamics.tasks.probes import as_trained as as_trained
from dynamics.tasks.probes import head_roles as head_roles
from dynamics.tasks.probes import in_order as in_order
