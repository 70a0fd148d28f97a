"""What a cancelled flow run must not leave behind: `on_cancellation` of the flows that train or measure.

Called in a process of the worker, because the flow's own may have been killed before it stopped its job; and by
`flows.recovery`, where it finds such a flow run without a process.
"""

from __future__ import annotations

import json
from pathlib import Path

from prefect.client.schemas.objects import FlowRun

from dapo.config.run import RunConfig
from dapo.runtime.evaluation import stop_jobs
from flows.parameters import configured
from tasks.train import stop_running_job


def stop_job(flow: object, flow_run: FlowRun, state: object) -> None:
    """Of `dapo`."""
    stop_running_job(configured(flow_run.parameters))


def stop_training(flow: object, flow_run: FlowRun, state: object) -> None:
    """Of `retrain`, which measures too: the subflow that trains does not know that its parent was cancelled."""
    place = retraining_file(configured(flow_run.parameters), str(flow_run.id))
    if place.is_file():
        stop_running_job(RunConfig.model_validate(json.loads(place.read_text())["training"]))
    stop_evaluation(flow, flow_run, state)


def stop_evaluation(flow: object, flow_run: FlowRun, state: object) -> None:
    """Of `evaluate`."""
    stop_jobs(configured(flow_run.parameters), str(flow_run.id))


def retraining_file(run: RunConfig, flow_run_id: str) -> Path:
    """JSON of a flow run of `retrain`: `reason`, `training` (a configuration), and `champion`, the version that the
    challenger is compared with."""
    return Path(run.run_root).resolve() / "retrain" / f"{flow_run_id}.json"


HOOKS = {"dapo": stop_job, "retrain": stop_training, "evaluate": stop_evaluation}
"""By the flow's name."""
