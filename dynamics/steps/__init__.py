"""One optimizer step: its gradient, its clipping, the step itself, and replaying recorded ones."""

from dynamics.steps.differences import update_difference as update_difference
from dynamics.steps.gradients import NonFiniteGradient as NonFiniteGradient
from dynamics.steps.gradients import StepGradient as StepGradient
from dynamics.steps.gradients import gradient as gradient
from dynamics.steps.replaying import advance as advance
from dynamics.steps.replaying import reach as reach
from dynamics.steps.replaying import replay as replay
from dynamics.steps.taps import Cache as Cache
from dynamics.steps.update import step_from as step_from
from dynamics.steps.update import steps_from as steps_from
from dynamics.steps.verifying import FileReport as FileReport
from dynamics.steps.verifying import Verdict as Verdict
from dynamics.steps.verifying import environment_changes as environment_changes
from dynamics.steps.verifying import verify as verify
from dynamics.steps.verifying import verify_files as verify_files
from dynamics.steps.walking import walk as walk
