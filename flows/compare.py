"""The flow `compare`: runs side by side, from what MLflow knows of them.

dapo compare RUN RUN                                                  here and now
prefect deployment run compare/experiments -p runs='["a", "b"]'       by a Prefect worker
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from prefect import flow

from dapo.errors import ConfigError
from tasks.compare import compare as compare_runs


def page_for(runs: list[str], run_root: str) -> Path:
    """Where the page of these runs is written."""
    names = "-".join(Path(run).name[:24] for run in runs)
    return Path(run_root).resolve() / "comparisons" / f"{names}.html"


def store(tracking_uri: str | None, run_root: str) -> str:
    """The MLflow store: as given, else MLFLOW_TRACKING_URI, else SQLite in `run_root`."""
    local = f"sqlite:///{Path(run_root).resolve() / 'mlflow.db'}"
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local


def run_name() -> str:
    """What and when."""
    return f"compare-{datetime.now():%Y-%m-%d-%H%M%S}"


@flow(name="compare", flow_run_name=run_name, persist_result=False)
def compare(runs: list[str], tracking_uri: str | None = None, run_root: str = "runs") -> str:
    """Compare runs: what differs, metrics at equal steps, responses and device-hours, paired intervals, cost.

    Args:
        runs: MLflow run ids, run names or beginnings of names; the first is what the others are measured against.
        tracking_uri: MLflow store; null: MLFLOW_TRACKING_URI, else SQLite in `run_root`.
        run_root: folder of runs; the page goes into its `comparisons`.

    Returns:
        The page.
    """
    if len(runs) < 2:
        raise ConfigError(f"a comparison needs at least two runs, got {len(runs)}")
    return compare_runs(runs, store(tracking_uri, run_root), str(page_for(runs, run_root)))
