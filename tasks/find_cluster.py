"""Ray: the configured cluster, or one on this machine, started where none runs. Takes ten seconds the first time."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from dapo.config.run import RunConfig
from tasks.progress import StageProgress, notify


@task(cache_policy=NO_CACHE, persist_result=False)
def find_cluster(config: RunConfig) -> str:
    """Address of the dashboard. Running it again finds the same cluster."""
    from dapo.runtime.cluster import connect

    notify(StageProgress("find_cluster", "running", detail=config.ray.address or "a Ray on this machine"))
    address = connect(config).address
    notify(StageProgress("find_cluster", "done", detail=address))
    return address
