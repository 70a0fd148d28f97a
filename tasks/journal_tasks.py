"""One Prefect task run per validation and per checkpoint, while training goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from dapo.observe.mlflow_page import page
from dapo.observe.run_folder import RunFolder
from tasks.progress import artifact_key, best_effort

_SHIPPED_WITHIN_S = 60.0


@task(task_run_name="record_validation-step-{step}", cache_policy=NO_CACHE, persist_result=False)
def record_validation(run: str, step: int, metrics: Mapping[str, float], table: str, best: bool, offset: int) -> str:
    """A table of answers beside the numbers, and the events `dapo.validation.completed` and `dapo.best.found`.

    Args:
        run: the run's folder.
        step: after how many training steps.
        metrics: by name, as in docs/metrics.md.
        table: path of the answers, relative to the folder.
        best: no earlier validation was better.
        offset: end of this event in the journal.
    """
    folder = RunFolder(Path(run))
    get_run_logger().info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    for event in ("dapo.validation.completed", *(["dapo.best.found"] if best else [])):
        _emit(event, folder, {"step": step, **metrics})
    where = _in_mlflow(folder, offset)
    rows = [json.loads(line) for line in (folder.root / table).read_text().splitlines()]
    shown = ("question", "answer", "response", "extracted", "accuracy", "tokens")
    best_effort(
        create_table_artifact,
        [{name: row.get(name) for name in shown} for row in rows],
        key=artifact_key("validation", folder.id),
        description=f"{folder.id}, step {step}: accuracy {metrics['val/accuracy']:.3f}{where}",
    )
    return where


@task(task_run_name="log_checkpoint-step-{step}", cache_policy=NO_CACHE, persist_result=False)
def log_checkpoint(run: str, step: int, path: str, metrics: Mapping[str, float], best: bool, offset: int) -> str:
    """A link to the checkpoint, the event `dapo.checkpoint.saved`, and the confirmation that MLflow has it.

    Args:
        run: the run's folder.
        step: after how many training steps.
        path: of the checkpoint, relative to the folder.
        metrics: of the validation at the same step; empty where there was none.
        best: the best by validation accuracy so far.
        offset: end of this event in the journal.
    """
    folder = RunFolder(Path(run))
    place = folder.root / path
    get_run_logger().info("step %d: saved %s%s", step, place, " (the best so far)" if best else "")
    _emit("dapo.checkpoint.saved", folder, {"step": step, "path": str(place), "best": best, **metrics})
    where = _in_mlflow(folder, offset)
    best_effort(
        create_link_artifact,
        place.as_uri(),
        link_text=f"{folder.id}, step {step}",
        key=artifact_key("checkpoint", folder.id),
        description=f"Checkpoint of step {step}{', the best so far' if best else ''}{where}",
    )
    return where


def alarm_raised(folder: RunFolder, step: int, name: str, message: str) -> None:
    """The event `dapo.alarm.raised`, a trigger for automations."""
    _emit("dapo.alarm.raised", folder, {"step": step, "name": name, "message": message})


def _emit(event: str, folder: RunFolder, payload: dict[str, Any]) -> None:
    """One event; sent a second time, after a crash, it has the same id, and Prefect keeps one."""
    resource = {"prefect.resource.id": f"dapo.run.{folder.id}", "prefect.resource.name": folder.id}
    identity = f"{folder.id} {folder.manifest.stat().st_mtime_ns} {event} {payload['step']} {payload.get('name')}"
    best_effort(emit_event, event, resource=resource, payload=payload, id=uuid5(NAMESPACE_OID, identity))


def _in_mlflow(folder: RunFolder, offset: int) -> str:
    """Wait until the shipper has sent the journal up to here; a link to the run's page, for a description."""
    end_at = time.monotonic() + _SHIPPED_WITHIN_S
    while time.monotonic() < end_at:
        try:
            state = json.loads(folder.mlflow.read_text())
        except (OSError, ValueError):
            state = {"offset": 0}
        if state["offset"] >= offset:
            break
        time.sleep(1.0)
    else:
        get_run_logger().warning("MLflow has not received this yet; it is sent when it answers again")
    address = page(folder)
    return f" - [MLflow]({address})" if address else ""
