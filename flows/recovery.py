"""Flow runs whose process is gone: found, marked crashed, and scheduled again to follow their training.

Prefect's server does not look after processes. A worker that lives notices the death of its flow runs; killed or
stopped itself it leaves them Running for ever. So every flow run says where its process is, and every flow that starts
on the same machine, and `dapo up`, looks for those that are gone.
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
from tasks.outage import patiently
from tasks.progress import best_effort

log = logging.getLogger("dapo.flows")

LABEL = "dapo.process"
COMEBACKS = 5
"""Times a crashed flow run of a deployment is scheduled again by itself."""
COMEBACK_S = 10.0
_WHY = "the flow's process is gone (killed, or with its worker or machine); training it had begun goes on"


def begin() -> None:
    """To be called first in a flow: says where its process is, and closes the flow runs whose process is gone."""
    if this_run.id:
        best_effort(_tell_place, UUID(this_run.id))
        best_effort(sweep)


def sweep() -> list[str]:
    """Mark flow runs of this machine crashed whose process is gone, and schedule those of deployments again.

    Returns:
        Their names.
    """
    closed = []
    with get_client(sync_client=True) as client:
        active = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=active))):
            if _gone(run):
                _close(client, run)
                closed.append(run.name)
    if closed:
        log.warning("closed, their processes are gone: %s", ", ".join(closed))
    return closed


def come_back(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """`on_crashed` of a flow: whatever it was doing goes on without it, or can be gone on with.

    A flow run that is retried while its old process still ends is called crashed for that process, and is on its way.
    """
    with get_client(sync_client=True) as client:
        now = client.read_flow_run(flow_run.id)
        if now.state is None or not now.state.is_crashed():
            return
        _close_task_runs(client, now)
        _schedule_again(client, now)


def wait_for_server() -> None:
    """A flow's last word needs the server: without it a training that finished would be a flow run that crashed."""
    patiently(lambda client: client.read_flow_run(UUID(this_run.id)), "the end of the flow")


def _tell_place(flow_run_id: UUID) -> None:
    ours = processes.look(os.getpid())
    assert ours is not None, "this process lives"
    with get_client(sync_client=True) as client:
        attempt = client.read_flow_run(flow_run_id).run_count
        place = f"{socket.gethostname()}:{_boot()}:{ours.pid}:{ours.born}:{attempt}"
        client.update_flow_run_labels(flow_run_id, {LABEL: place})


def _gone(run: FlowRun) -> bool:
    """Whether the process that this attempt told of lived on this machine and does not now."""
    told = str(run.labels.get(LABEL, "")).split(":")
    if len(told) != 5:
        return False
    host, boot, pid, born, attempt = told
    if host != socket.gethostname() or int(attempt) != run.run_count:
        return False  # another machine's; or a new attempt that has not told yet
    process = processes.look(int(pid))
    return boot != _boot() or process is None or process.born != int(born)


def _close(client: SyncPrefectClient, run: FlowRun) -> None:
    _close_task_runs(client, run)
    assert run.state is not None, "an active flow run has a state"
    if run.state.is_cancelling():
        _run_cancellation_hook(client, run)
        client.set_flow_run_state(run.id, Cancelled(message=_WHY), force=True)
        return
    client.set_flow_run_state(run.id, Crashed(message=_WHY), force=True)
    _schedule_again(client, run)


def _close_task_runs(client: SyncPrefectClient, run: FlowRun) -> None:
    running = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    for task_run in client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=running, name=None)),
    ):
        client.set_task_run_state(task_run.id, Crashed(message=_WHY), force=True)


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
    """Tells this start of the machine from the one before: numbers of processes begin anew."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
