"""The one exception for everything that is wrong with a run folder or one of its files."""


class TrajectoryError(Exception):
    """A run folder, its manifest or a checkpoint file is not what it should be, or may not be written."""
