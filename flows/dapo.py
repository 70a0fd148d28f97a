"""The flow `dapo`: data and weights, checks of the machine, training as a Ray job, a report.

dapo run configs/geo3k_tiny.yaml            here and now
python -m flows.dapo --help                 the same
prefect deployment run dapo/geo3k-tiny      by a Prefect worker
"""

from __future__ import annotations

import os
import sys
from typing import Any

from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled

from dapo.config.run import RunConfig
from dapo.runtime.ray_job import already_finished
from flows import names
from flows.cancellation import stop_job
from flows.parameters import DEFAULT_PATH, Overrides, resolve
from flows.recovery import begin, come_back, wait_for_server
from tasks import inputs
from tasks.cached import CachedStage
from tasks.fetch_weights import fetch_weights
from tasks.find_cluster import find_cluster
from tasks.prepare_dataset import prepare_dataset
from tasks.report import report
from tasks.train import as_begun, stop_running_job, stopped, train
from tasks.validate_environment import validate_environment
from tasks.watch import cancelled, interrupted_when_cancelled


def run_name() -> str:
    return names.of_training(flow_run.parameters)


@flow(name="dapo", flow_run_name=run_name, persist_result=False, on_cancellation=[stop_job], on_crashed=[come_back])
def dapo(config_path: str = DEFAULT_PATH, overrides: Overrides = None, config: RunConfig | None = None) -> Any:
    """Train a vision-language model with DAPO.

    Args:
        config_path: YAML file, relative to the worker's working directory.
        overrides: dotted keys on top of the file, for example {"train.steps": 5}.
        config: a whole configuration instead of the file; the overrides apply to it too.
    """
    run = as_begun(resolve(config_path, overrides, config))
    begin()
    to_train = already_finished(run) is None
    try:
        with interrupted_when_cancelled():
            data, weights = _inputs(run, to_train)
        status = train(run, data, weights)
    except TerminationSignal:
        if not cancelled():
            raise
        stop_running_job(run)  # an earlier flow run's
        return Cancelled(message="cancelled before it followed a training")
    if status not in ("finished", "stopped"):
        return Cancelled(message=status)
    report(run)
    wait_for_server()
    return stopped(run) if status == "stopped" else status


def _inputs(run: RunConfig, to_train: bool) -> tuple[str, str]:
    """Folders of data and weights; the machine was checked against them."""
    validate_environment(run, "machine")
    try:
        cluster = find_cluster.submit(run) if to_train else None
        dataset = CachedStage(prepare_dataset, run.data)
        model = CachedStage(fetch_weights, run.model.source, run.data.cache_dir)
        data, weights = dataset.result(), model.result()
    finally:
        inputs.abort_all()
    if cluster is not None:
        cluster.result()
    validate_environment(run, "inputs", data, weights, on_cluster=to_train)
    return data, weights


if __name__ == "__main__":
    # Another interpreter: in this one Prefect has read its settings, before the server of a run here was chosen.
    os.execv(sys.executable, [sys.executable, "-m", "dapo.cli", "run", *sys.argv[1:]])
