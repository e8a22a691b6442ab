"""Packages with known vulnerabilities."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def vulnerabilities(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """pip-audit of the installed packages: 0 with a known vulnerability (asks the index for each of them)"""
    if importlib.util.find_spec("pip_audit") is None:
        yield "not looked at: pip-audit is not installed"
        return
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--format",
        "json",
        "--progress-spinner",
        "off",
        "--skip-editable",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError):
        yield f"not looked at: {(done.stderr.strip() or 'no answer').splitlines()[-1]}"
        return
    for package in found:
        known = [each["id"] for each in package.get("vulns", [])]
        yield f"BROKEN: {package['name']} {package['version']}: {', '.join(known)}" if known else "none known"
