"""What `dapo up` and `dapo down` ask of the Prefect API: the work pool, its workers, its flow runs.

Prefect reads its settings when it is imported: import this module when PREFECT_API_URL is set.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.exceptions import ObjectNotFound

from dapo.errors import EnvironmentCheckError
from tasks.turn import WAITING

_ACTIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def make_pool(name: str) -> bool:
    """Create the process work pool; False where there is one of this name, of whatever type."""
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
            return True
    if pool.is_paused:
        raise EnvironmentCheckError(f"work pool {name} is paused: prefect work-pool resume {name}")
    return False


def pool_type(name: str) -> str:
    """For example `process`."""
    with get_client(sync_client=True) as client:
        return client.read_work_pool(name).type


def online_workers(pool: str) -> dict[str, datetime]:
    """Workers with a recent heartbeat, by name, with its time."""
    found = {}
    with get_client(sync_client=True) as client:
        for worker in client.read_workers_for_work_pool(pool):
            heard, every = worker.last_heartbeat_time, worker.heartbeat_interval_seconds or 30
            fresh = heard is not None and datetime.now(UTC) - heard < timedelta(seconds=3 * every)
            if heard is not None and fresh and worker.status == WorkerStatus.ONLINE:
                found[worker.name] = heard
    return found


def following(pool: str, flow_runs: set[UUID]) -> list[FlowRun]:
    """Flow runs that a worker of `pool` has taken and that have not ended: these, and parents of these."""
    with get_client(sync_client=True) as client:
        return [run for run in _active(client, pool) if run.id in flow_runs or _is_parent(client, run, flow_runs)]


def cancel_waiting(pool: str) -> list[FlowRun]:
    """Cancel the flow runs that wait for another training."""
    with get_client(sync_client=True) as client:
        waiting = [run for run in _active(client, pool) if WAITING in run.tags]
        for run in waiting:
            client.set_flow_run_state(run.id, State(type=StateType.CANCELLING, name="Cancelling"))
    return waiting


def _is_parent(client: SyncPrefectClient, run: FlowRun, flow_runs: set[UUID]) -> bool:
    children = FlowRunFilter(
        id=FlowRunFilterId(any_=list(flow_runs)), parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id])
    )
    return bool(client.read_flow_runs(flow_run_filter=children))


def _active(client: SyncPrefectClient, pool: str) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_ACTIVE))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
    )
