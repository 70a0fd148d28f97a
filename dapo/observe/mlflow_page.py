"""Where a person finds a run in MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dapo.observe.run_folder import RunFolder


def page(folder: RunFolder) -> str | None:
    """Address of the run's page in MLflow; None before anything was shipped, and where no server shows the store."""
    saved = _read(folder.mlflow)
    store, experiment = str(saved.get("tracking_uri", "")), saved.get("experiment_id")
    server = store if store.startswith("http") else _shown_by(folder.root.parent, store)
    if not server or experiment is None:
        return None
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs/{saved['run_id']}"


def _shown_by(runs: Path, store: str) -> str | None:
    """Address of the MLflow server that `dapo up` started over this database.

    It need not answer now: the next `dapo up` starts it at the same place.
    """
    record = _read(runs / ".up" / "mlflow.json")
    return str(record["address"]) if store and store in record.get("command", ()) else None


def _read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where it is missing or half written."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
