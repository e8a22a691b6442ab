"""Whole studies: train, patch, summarise, draw, and say in words what was found."""

from dynamics.steps import environment_changes as environment_changes
from dynamics.studies.aliases import run as run
from dynamics.studies.checks import Check as Check
from dynamics.studies.checks import as_dataset as as_dataset
from dynamics.studies.checks import ten_checks as ten_checks
from dynamics.studies.comparing import Compared as Compared
from dynamics.studies.comparing import compare_every as compare_every
from dynamics.studies.comparing import compare_pair as compare_pair
from dynamics.studies.late_accuracy import internalisation as internalisation
from dynamics.studies.verification import verify as verify

battery = ten_checks
"""The name that `ten_checks` had."""
