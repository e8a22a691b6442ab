"""Exchange one quantity at one site between two training runs, take the step, measure what changed.

The names below are imported when they are first used, so that `import dynamics` is quick.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoints import Checkpoint as Checkpoint
    from checkpoints import CheckpointPair as CheckpointPair
    from checkpoints import Trajectory as Trajectory
    from checkpoints import TrajectoryWriter as TrajectoryWriter
    from dynamics import comparison as comparison
    from dynamics import measures as measures
    from dynamics import plots as plots
    from dynamics import report as report
    from dynamics import results as results
    from dynamics import sites as sites
    from dynamics import statistics as statistics
    from dynamics import steps as steps
    from dynamics import studies as studies
    from dynamics import tasks as tasks
    from dynamics import training as training
    from dynamics.attribution import attribute_activations as attribute_activations
    from dynamics.attribution import attribute_examples as attribute_examples
    from dynamics.attribution import attribute_parameters as attribute_parameters
    from dynamics.attribution import attribute_paths as attribute_paths
    from dynamics.attribution import attribute_step as attribute_step
    from dynamics.attribution import attribute_training as attribute_training
    from dynamics.attribution import circuit as circuit
    from dynamics.batch import Batch as Batch
    from dynamics.comparison import compare as compare
    from dynamics.config import StudyConfig as StudyConfig
    from dynamics.engine.stack_memory import max_memory as max_memory
    from dynamics.models.bridges import bridge as bridge
    from dynamics.models.bridges import processed_bridge as processed_bridge
    from dynamics.patching import both_directions as both_directions
    from dynamics.patching import interactions as interactions
    from dynamics.patching import interchange as interchange
    from dynamics.patching import patch_activations as patch_activations
    from dynamics.patching import patch_factors as patch_factors
    from dynamics.patching import patch_gradients as patch_gradients
    from dynamics.patching import patch_parameters as patch_parameters
    from dynamics.patching import patch_paths as patch_paths
    from dynamics.patching import patch_signals as patch_signals
    from dynamics.patching import patch_updates as patch_updates
    from dynamics.patching import patch_window as patch_window
    from dynamics.patching import shapley_values as shapley_values
    from dynamics.recipe import ByNorm as ByNorm
    from dynamics.recipe import ByValue as ByValue
    from dynamics.recipe import Contrast as Contrast
    from dynamics.recipe import Recipe as Recipe
    from dynamics.steps.caching import cache as cache
    from dynamics.sweeps import account as account
    from dynamics.sweeps import sweep as sweep
    from dynamics.tasks import PromptDataset as PromptDataset
    from dynamics.tasks import prompt_contrasts as prompt_contrasts
    from dynamics.tasks import top_answers as top_answers

    __version__: str

_MODULES = (
    "comparison",
    "measures",
    "plots",
    "report",
    "results",
    "sites",
    "statistics",
    "steps",
    "studies",
    "tasks",
    "training",
)
_HOMES = {
    "Checkpoint": "checkpoints",
    "CheckpointPair": "checkpoints",
    "Trajectory": "checkpoints",
    "TrajectoryWriter": "checkpoints",
    "attribute_activations": "dynamics.attribution",
    "attribute_examples": "dynamics.attribution",
    "attribute_parameters": "dynamics.attribution",
    "attribute_paths": "dynamics.attribution",
    "attribute_step": "dynamics.attribution",
    "attribute_training": "dynamics.attribution",
    "circuit": "dynamics.attribution",
    "Batch": "dynamics.batch",
    "compare": "dynamics.comparison",
    "StudyConfig": "dynamics.config",
    "bridge": "dynamics.models.bridges",
    "processed_bridge": "dynamics.models.bridges",
    "both_directions": "dynamics.patching",
    "interchange": "dynamics.patching",
    "interactions": "dynamics.patching",
    "max_memory": "dynamics.engine.stack_memory",
    "shapley_values": "dynamics.patching",
    "patch_activations": "dynamics.patching",
    "patch_gradients": "dynamics.patching",
    "patch_window": "dynamics.patching",
    "patch_parameters": "dynamics.patching",
    "patch_paths": "dynamics.patching",
    "patch_signals": "dynamics.patching",
    "patch_factors": "dynamics.patching",
    "patch_updates": "dynamics.patching",
    "ByNorm": "dynamics.recipe",
    "ByValue": "dynamics.recipe",
    "Contrast": "dynamics.recipe",
    "Recipe": "dynamics.recipe",
    "cache": "dynamics.steps.caching",
    "account": "dynamics.sweeps",
    "sweep": "dynamics.sweeps",
    "PromptDataset": "dynamics.tasks",
    "prompt_contrasts": "dynamics.tasks",
    "top_answers": "dynamics.tasks",
}

__all__ = [*_MODULES, *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"dynamics.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("training-dynamics")
    raise AttributeError(f"module 'dynamics' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _expect_own_checkpoints() -> None:
    """Raise an ImportError where a folder of the user's stands in for the package that `dynamics` needs."""
    spec, own = find_spec("checkpoints"), Path(__file__).parents[1] / "checkpoints" / "__init__.py"
    found = None if spec is None else spec.origin
    if found is None or not Path(found).samefile(own):
        raise ImportError(
            f"`import checkpoints` finds {found or 'a folder without __init__.py'}, but dynamics needs its own "
            f"package of that name, {own.parent}. A folder or file `checkpoints` in the working directory, or "
            "beside the script that runs, comes first: rename it, or run from elsewhere."
        )


_expect_own_checkpoints()
