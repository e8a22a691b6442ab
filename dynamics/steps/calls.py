"""Moved to dynamics.calls."""

from dynamics.calls import call as call
from dynamics.calls import evaluating as evaluating
