"""The error a user can mend."""


class SweepError(ValueError):
    """A sweep that cannot be taken as it was asked for; the message says what to change."""
