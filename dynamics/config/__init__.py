"""What a run is: one frozen dataclass per task, checked where it is made.

Plain data without torch, so that the command line can show and check it at once.
"""

from dynamics.config.aliases import AliasConfig as AliasConfig
from dynamics.config.aliases import Level as Level
from dynamics.config.aliases import MeasureName as MeasureName
from dynamics.config.aliases import Operation as Operation
from dynamics.config.aliases import OptimizerState as OptimizerState
from dynamics.config.aliases import PatchingConfig as PatchingConfig
from dynamics.config.aliases import PhasesConfig as PhasesConfig
from dynamics.config.aliases import PrimaryConfig as PrimaryConfig
from dynamics.config.aliases import StudyConfig as StudyConfig
from dynamics.config.aliases import answer as answer
from dynamics.config.aliases import identifies as identifies
from dynamics.config.checks import ConfigError as ConfigError
from dynamics.config.kinds import KINDS as KINDS
from dynamics.config.kinds import kind_of as kind_of
from dynamics.config.kinds import read as read
from dynamics.config.kinds import task_name as task_name
from dynamics.config.languages import AcronymsConfig as AcronymsConfig
from dynamics.config.languages import AcronymsRun as AcronymsRun
from dynamics.config.languages import FactsConfig as FactsConfig
from dynamics.config.languages import FactsRun as FactsRun
from dynamics.config.languages import IoiConfig as IoiConfig
from dynamics.config.languages import IoiRun as IoiRun
from dynamics.config.languages import LatePhasesConfig as LatePhasesConfig
from dynamics.config.languages import OnePhaseConfig as OnePhaseConfig
from dynamics.config.parts import PhaseConfig as PhaseConfig
from dynamics.config.parts import RunConfig as RunConfig
from dynamics.config.parts import ScheduleConfig as ScheduleConfig
from dynamics.config.parts import ToyConfig as ToyConfig
from dynamics.config.parts import TrainerConfig as TrainerConfig
