"""The end of a retraining: the decision is recorded, and the champion's alias moves or stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from dapo.config.run import RunConfig
from tasks.progress import best_effort
from tasks.retry import may_pass


@task(retries=3, retry_delay_seconds=30, retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False)
def promote(config: RunConfig, challenger: int, champion: int | None, decision: Mapping[str, Any]) -> str:
    """The decision's file. Safe to repeat.

    Args:
        config: `mlflow` names registry and model.
        challenger: version that was judged.
        champion: version it was compared with; None: the base, which is not registered.
        decision: `promote`, `reasons`, `difference` and what else is to be kept; `promote: null` waits for a person.
    """
    from dapo.eval.mlflow_records import record_decision
    from dapo.observe.registry import Registry
    from dapo.observe.shipper import tracking_uri

    name = config.mlflow.registered_model or ""
    registry = Registry(tracking_uri(config), name)
    ours = registry.require(challenger)
    theirs = registry.require(champion) if champion is not None else None
    if decision["promote"]:
        registry.promote(ours, over=theirs)
    path = record_decision(registry, ours, theirs, decision, Path(config.run_root).resolve())
    if decision["promote"] is not None:
        event = "dapo.model.promoted" if decision["promote"] else "dapo.model.refused"
        get_run_logger().info("%s %s: %s", ours.reference, event.rpartition(".")[2], "; ".join(decision["reasons"]))
        resource = {"prefect.resource.id": f"dapo.model.{name}", "prefect.resource.name": name}
        payload = {"version": challenger, "champion": champion, "reasons": list(decision["reasons"])}
        best_effort(emit_event, event, resource=resource, payload=payload)
    return str(path)
