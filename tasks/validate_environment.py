"""Checks before a device is used: the machine first, in a second; data, weights and cluster once they exist."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from dapo.config.run import RunConfig
from dapo.plan import checks
from dapo.plan.check_table import Check, refuse, verdict
from tasks.progress import StageProgress, artifact_key, best_effort, notify


@task(task_run_name="validate_environment-{of}", cache_policy=NO_CACHE, persist_result=False)
def validate_environment(
    config: RunConfig, of: str, data: str = "", weights: str = "", on_cluster: bool = True
) -> list[Check]:
    """All checks of one kind: `machine` before anything is fetched, `inputs` before training.

    Args:
        config: the run.
        of: machine | inputs.
        data: folder of prepared data (inputs).
        weights: Hugging Face folder (inputs).
        on_cluster: False where the run needs no cluster any more.

    Raises:
        EnvironmentCheckError: a check failed; the message is the table of everything that is not in order.
    """
    if of == "machine":
        found = checks.machine(config)
    else:
        found = [*checks.inputs(config, Path(data), Path(weights)), *(_cluster(config) if on_cluster else ())]
    log = get_run_logger()
    for check in found:
        if check.status in ("warn", "fail"):
            log.warning("%s", check)
    rows = [{"status": c.status, "check": c.name, "reason": c.reason, "remedy": c.remedy} for c in found]
    best_effort(create_table_artifact, rows, key=artifact_key("environment", of), description=f"{config.name}: {of}")
    refuse(config.name, found)
    notify(StageProgress("validate_environment", "done", detail=verdict(found)))
    return found


def _cluster(config: RunConfig) -> Sequence[Check]:
    from dapo.runtime.cluster import connect, local_pids

    return checks.cluster(config, connect(config).nodes(), local_pids(config))
