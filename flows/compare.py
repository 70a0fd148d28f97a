"""The flow `compare`: runs side by side, from what MLflow knows of them.

dapo compare RUN RUN                                                  here and now
prefect deployment run compare/experiments -p runs='["a", "b"]'       by a Prefect worker
"""

from __future__ import annotations

from datetime import datetime

from prefect import flow

from dapo.eval.runs import store
from flows.recovery import begin, come_back
from tasks.compare import compare as compare_runs


def run_name() -> str:
    """What and when."""
    return f"compare-{datetime.now():%Y-%m-%d-%H%M%S}"


@flow(name="compare", flow_run_name=run_name, persist_result=False, on_crashed=[come_back])
def compare(runs: list[str], tracking_uri: str | None = None, run_root: str = "runs") -> str:
    """Compare runs: what differs, metrics at equal steps, responses and device-hours, paired intervals, cost.

    Args:
        runs: MLflow run ids, run names or beginnings of names; the first is what the others are measured against.
        tracking_uri: MLflow store; null: MLFLOW_TRACKING_URI, else SQLite in `run_root`.
        run_root: folder of runs; the page goes into its `comparisons`.

    Returns:
        The page.
    """
    begin()
    return compare_runs(runs, store(tracking_uri, run_root), run_root)
