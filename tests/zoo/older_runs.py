"""Run folders as older versions of the package wrote them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints import index, store, values


def as_schema_1(run: Path) -> dict[str, Any]:
    """Turn a run into one of schema version 1: its manifest names the checkpoints, and nothing is sealed."""
    manifest = store.read_manifest(run)
    document = {
        "schema_version": 1,
        "config": values.to_json(manifest.config),
        "provenance": values.to_json(manifest.provenance),
        "checkpoints": [asdict(entry) for entry in manifest.entries],
    }
    (run / store.MANIFEST).write_text(json.dumps(document, indent=1))
    (run / index.INDEX).unlink()
    return document


RUN_2 = Path(__file__).parent / "older" / "run-2"
"""Steps 0 and 1 of AdamW on two linear layers, the first frozen: checkpoints of schema 2."""
