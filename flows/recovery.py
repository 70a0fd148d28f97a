"""Flow runs whose process is gone: found, marked crashed, and scheduled again to follow their training.

Prefect's server does not watch processes. A living worker notices when its flow runs die; a worker that was itself
killed or stopped leaves them Running for ever. So every flow run records where its process is, and every flow that
starts on the same machine, and `dapo up`, looks for processes that are gone. Where a flow run died before it could
record that, or during an outage of the server, the name of the worker of `dapo up` identifies the machine.
"""

from __future__ import annotations

import logging
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.runtime import flow_run as this_run
from prefect.states import AwaitingRetry, Cancelled, Crashed

from dapo.runtime import processes
from flows.cancellation import HOOKS
from tasks.outage import wait_through_outage
from tasks.progress import best_effort

log = logging.getLogger("dapo.flows")

LABEL = "dapo.process"
COMEBACKS = 5
"""Times a crashed flow run of a deployment is scheduled again by itself."""
COMEBACK_S = 10.0
_ACTIVE = (StateType.RUNNING, StateType.CANCELLING)
_ENGINES = ("prefect.engine", "prefect.flow_engine", "prefect flow-run execute")
"""What runs a flow run, on the command line of its process."""
_WHY = "the flow's process is gone (killed, or with its worker or machine); training it had begun goes on"


def begin() -> None:
    """Call first in a flow: records where its process is, and closes the flow runs whose process is gone."""
    if this_run.id:
        best_effort(_tell_place, UUID(this_run.id))
        best_effort(sweep)


def leave() -> None:
    """Call before a suspension: this process ends on purpose.

    A resumed flow run is the same attempt in another process; until that process has recorded itself, the end of this
    one would count as the end of the flow run.
    """
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(this_run.id), {LABEL: ""})


def sweep() -> list[str]:
    """Mark flow runs of this machine crashed whose process is gone, and schedule those of deployments again.

    Returns:
        Their names.
    """
    closed = []
    with get_client(sync_client=True) as client:
        active = FlowRunFilterStateType(any_=list(_ACTIVE))
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=active))):
            # Read again: it may have ended normally since the list was read.
            if _gone(run) and _is_active(now := client.read_flow_run(run.id)):
                _close(client, now)
                closed.append(run.name)
    if closed:
        log.warning("closed, their processes are gone: %s", ", ".join(closed))
    return closed


def come_back(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """`on_crashed` of a flow: schedule it again; its work goes on without it or can be continued.

    A flow run that is retried while its old process still ends is reported as crashed, but is already running again.
    """
    with get_client(sync_client=True) as client:
        now = client.read_flow_run(flow_run.id)
        if now.state is None or not now.state.is_crashed():
            return
        _close_parts(client, now)
        _schedule_again(client, now)


def wait_for_server() -> None:
    """Wait for the server before the final state is sent: otherwise a finished training would be a crashed flow run."""
    wait_through_outage(lambda client: client.read_flow_run(UUID(this_run.id)), "the end of the flow")


def _tell_place(flow_run_id: UUID) -> None:
    ours = processes.look(os.getpid())
    assert ours is not None, "this process lives"
    with get_client(sync_client=True) as client:
        attempt = client.read_flow_run(flow_run_id).run_count
        place = f"{socket.gethostname()}:{_boot()}:{ours.pid}:{ours.born}:{attempt}"
        client.update_flow_run_labels(flow_run_id, {LABEL: place})


def _is_active(run: FlowRun) -> bool:
    return run.state is not None and run.state.type in _ACTIVE


def _gone(run: FlowRun) -> bool:
    """Whether this attempt's process lived on this machine and does not now."""
    parts = str(run.labels.get(LABEL, "")).split(":")
    if len(parts) != 5 or int(parts[4]) != run.run_count:
        return _started_here(run) and not _found_here(run)
    host, boot, pid, born, _ = parts
    process = processes.look(int(pid))
    if host != socket.gethostname() or (boot == _boot() and process is not None and process.born == int(born)):
        return False
    return not _found_here(run)  # a flow run that was suspended goes on in another process as the same attempt


def _started_here(run: FlowRun) -> bool:
    """Whether a worker of `dapo up` on this machine started it, as a process."""
    host, colon, _ = str(run.labels.get("prefect.worker.name", "")).partition(":")
    return bool(colon) and host == socket.gethostname() and run.labels.get("prefect.worker.type") == "process"


def _found_here(run: FlowRun) -> bool:
    """Whether Prefect's process for it lives.

    Prefect's process number does not decide: it may have been reused, or belong to an earlier attempt. The flow run's
    id is in the environment of the process, and of Ray and others that it started and that outlive it.
    """
    return any(
        str(process.pid) == run.infrastructure_pid
        or any(engine in " ".join(processes.command(process.pid)) for engine in _ENGINES)
        for process in processes.carrying(f"PREFECT__FLOW_RUN_ID={run.id}")
    )


def _close(client: SyncPrefectClient, run: FlowRun) -> None:
    _close_parts(client, run)
    assert run.state is not None, "an active flow run has a state"
    if run.state.is_cancelling():
        _run_cancellation_hook(client, run)
        client.set_flow_run_state(run.id, Cancelled(message=_WHY), force=True)
        return
    client.set_flow_run_state(run.id, Crashed(message=_WHY), force=True)
    _schedule_again(client, run)


def _close_parts(client: SyncPrefectClient, run: FlowRun) -> None:
    """Close the flow runs inside it as well, which had the same process."""
    running = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    for task_run in client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=running, name=None)),
    ):
        client.set_task_run_state(task_run.id, Crashed(message=_WHY), force=True)
    inside = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])),
    )
    for child in client.read_flow_runs(flow_run_filter=inside):
        client.set_flow_run_state(child.id, Crashed(message=_WHY), force=True)


def _schedule_again(client: SyncPrefectClient, run: FlowRun) -> None:
    """A worker is needed to start it, and a parent comes back with its children."""
    if run.deployment_id is None or run.parent_task_run_id is not None:
        return
    if run.run_count > COMEBACKS:
        log.warning("%s crashed %d times; `prefect flow-run retry %s` tries again", run.name, run.run_count, run.id)
        return
    later: State[Any] = AwaitingRetry(scheduled_time=datetime.now(UTC) + timedelta(seconds=COMEBACK_S))
    client.set_flow_run_state(run.id, later, force=True)


def _run_cancellation_hook(client: SyncPrefectClient, run: FlowRun) -> None:
    """What the worker would have done: a cancelled flow run must not leave its job behind."""
    flow = client.read_flow(run.flow_id)
    if hook := HOOKS.get(flow.name):
        best_effort(hook, flow, run, run.state)


def _boot() -> str:
    """Identifies this boot of the machine: process numbers begin anew with each."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
