"""The package is light to import and offers its public names."""

import subprocess
import sys

import pytest

import checkpoints
from checkpoints.checkpoint import Checkpoint


def test_importing_checkpoints_stays_light():
    script = (
        "import sys, checkpoints; print(sorted({'torch', 'h5py', 'numpy', 'dynamics'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed == "[]\n"


def test_public_names_are_offered_and_others_are_not():
    assert checkpoints.Checkpoint is Checkpoint
    assert all(getattr(checkpoints, name) for name in checkpoints.__all__)
    assert set(checkpoints.__all__) <= set(dir(checkpoints))
    with pytest.raises(AttributeError, match=r"no attribute 'Chekpoint'; it offers Checkpoint, "):
        checkpoints.Chekpoint  # noqa: B018
