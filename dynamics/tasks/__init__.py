"""Tasks: synthetic data with contrasts. `load` rebuilds a run's task from its config."""

from dynamics.tasks import acronyms as acronyms
from dynamics.tasks import aliases as aliases
from dynamics.tasks import facts as facts
from dynamics.tasks import ioi as ioi
from dynamics.tasks.acronyms import AcronymsTask as AcronymsTask
from dynamics.tasks.aliases import AliasTask as AliasTask
from dynamics.tasks.answers import top_answers as top_answers
from dynamics.tasks.datasets import PromptDataset as PromptDataset
from dynamics.tasks.datasets import prompt_contrasts as prompt_contrasts
from dynamics.tasks.facts import FactsTask as FactsTask
from dynamics.tasks.ioi import IoiTask as IoiTask
from dynamics.tasks.loading import load as load
from dynamics.tasks.planting import planted as planted
from dynamics.tasks.planting import tag_blind as tag_blind
from dynamics.tasks.probes import alias_questions as alias_questions
from dynamics.tasks.probes import as_trained as as_trained
from dynamics.tasks.probes import head_roles as head_roles
from dynamics.tasks.probes import in_order as in_order
from dynamics.tasks.task import Task as Task
from dynamics.tasks.text import Prompt as Prompt
from dynamics.tasks.text import PromptError as PromptError
from dynamics.tasks.words import Vocabulary as Vocabulary
