"""One optimizer step: its gradient, its clipping, the step itself, and replaying recorded ones."""

from dynamics.steps.gradient import NonFiniteGradient as NonFiniteGradient
from dynamics.steps.gradient import StepGradient as StepGradient
from dynamics.steps.gradient import gradient as gradient
from dynamics.steps.replay import advance as advance
from dynamics.steps.replay import reach as reach
from dynamics.steps.replay import replay as replay
from dynamics.steps.update import step_from as step_from
from dynamics.steps.update import steps_from as steps_from
