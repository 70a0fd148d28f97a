"""Journal events as Prefect task runs, each exactly once, over several flow runs and kills.

`prefect.json` in the run's folder holds the place up to which Prefect's server has confirmed the task runs, and the
flow runs that followed this run. What lies behind that place is looked for among their task runs before it is recorded.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterId,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed

from dapo.config.run import RunConfig
from dapo.files import write_whole
from dapo.observe.journal import Event
from dapo.observe.run_folder import RunFolder
from tasks.journal_tasks import alarm_raised, log_checkpoint, record_validation
from tasks.outage import OUTAGE_S, wait_through_outage
from tasks.progress import ProgressBar

log = logging.getLogger("dapo.tasks")

_ANSWERS_S = 5.0
_CONFIRM_EVERY_S = 3.0
_LOST_S = 30.0
"""A server that answers has written down what it was sent so long ago, or has lost it."""
_END_S = 120.0
_PAGE = 200
_STATE_FILE = "prefect.json"


@dataclass
class _Pending:
    """A task run that the server has not confirmed yet."""

    begin: int
    """Where its event begins in the journal."""
    submit: Callable[[], PrefectFuture[str]]
    future: PrefectFuture[str]
    done: bool = False
    missed_at: float | None = None
    """When an answering server first did not know that it is done."""

    def again(self) -> None:
        self.done, self.missed_at, self.future = False, None, self.submit()
        self.watch()

    def watch(self) -> None:
        this = self.future

        def mark(_: object) -> None:
            if self.future is this:
                self.done = True

        this.add_done_callback(mark)


class JournalRelay:
    """Passes a run's journal on to Prefect; `offset` is up to where it was read.

    Args:
        folder: of the run.
        config: `train.steps`, for the progress.
    """

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self._place = folder.root / _STATE_FILE
        saved = _saved(folder)
        self.offset: int = saved.get("offset", 0)
        self._alarms_reported: int = saved.get("alarms_told", self.offset)
        self._pending: list[_Pending] = []
        self._looked_at = 0.0
        before = known(folder)
        self._known = _completed(before) if before and self._behind() else set()
        self._flow_runs = [*before, *([flow_run.id] if flow_run.id not in (None, *before) else [])]
        self._remember()
        self._bar = ProgressBar("train", self.folder.id)

    def take(self, event: Event, offset: int) -> None:
        """One event of the journal, and the offset behind it."""
        begin, self.offset = self.offset, offset
        run, step, data = str(self.folder.root), event.step, event.data
        match event.kind:
            case "validation":
                values = {"metrics": data["metrics"], "table": data["table"], "best": data.get("best", False)}
                self._record(begin, record_validation, run=run, step=step, offset=offset, **values)
            case "checkpoint":
                values = {"path": data["path"], "metrics": data["metrics"], "best": data["best"]}
                self._record(begin, log_checkpoint, run=run, step=step, offset=offset, **values)
            case "alarm" if offset > self._alarms_reported:
                self._alarms_reported = offset
                get_run_logger().warning("step %d: %s: %s", step, data["name"], data["message"])
                alarm_raised(self.folder, step, data["name"], data["message"])
            case "step":
                self._bar(step, self.config.train.steps, f"step {step} of {self.config.train.steps}")
            case "started":
                get_run_logger().info("attempt %d starts at step %d", data["attempt"], step)
        self._remember()

    def confirm(self) -> bool:
        """From time to time, ask the server which task runs it has stored; quick. False in an outage."""
        done = [one for one in self._pending if one.done]
        if not done or time.monotonic() - self._looked_at < _CONFIRM_EVERY_S:
            return True
        self._looked_at = time.monotonic()
        try:
            with get_client(sync_client=True) as client:
                # Prefect's own requests are tried for minutes before they fail, and say nothing meanwhile.
                httpx.get(str(client.api_url).rstrip("/") + "/health", timeout=_ANSWERS_S).raise_for_status()
                written = _by_id(client, [one.future.task_run_id for one in done])
                for one in done:
                    self._settle(client, one, written.get(one.future.task_run_id))
        except Exception as error:
            # httpx' and Prefect's own errors: the server is away, and is asked again.
            log.debug("Prefect was not asked what it has written down: %s", error)
            return False
        self._remember()
        return True

    def finish(self) -> None:
        """Wait for the task runs and the server's confirmation, also through an outage.

        Where neither comes the next flow run of this run looks again.
        """
        begun = answered_at = time.monotonic()
        while self._pending and time.monotonic() - answered_at < OUTAGE_S:
            self._looked_at = min(self._looked_at, time.monotonic() - _CONFIRM_EVERY_S + 0.5)
            if self.confirm():
                answered_at = time.monotonic()
                if answered_at - begun > _END_S:
                    break
            else:
                begun = time.monotonic()
                log.warning("the Prefect server does not answer; %d task runs are not confirmed", len(self._pending))
                time.sleep(_CONFIRM_EVERY_S)
            time.sleep(0.2)
        if self._pending:
            words = "Prefect has not confirmed %d task runs; the next flow run of this run looks again"
            get_run_logger().warning(words, len(self._pending))
        self._bar.close()

    def _record(self, begin: int, task: Any, **given: Any) -> None:
        name = task.task_run_name.format(**given)
        if name in self._known:
            return
        one = _Pending(begin, lambda: task.submit(**given), task.submit(**given))
        self._pending.append(one)
        one.watch()

    def _settle(self, client: SyncPrefectClient, one: _Pending, written: TaskRun | None) -> None:
        if written is not None and written.state is not None and written.state.is_final():
            self._pending.remove(one)
            return
        one.missed_at = one.missed_at or time.monotonic()
        if time.monotonic() - one.missed_at < _LOST_S:
            return
        if written is None:
            one.again()
        else:
            client.set_task_run_state(written.id, Completed(message="the server had lost this"), force=True)

    def _behind(self) -> bool:
        return self.folder.journal.exists() and self.folder.journal.stat().st_size > self.offset

    def _remember(self) -> None:
        confirmed = min((one.begin for one in self._pending), default=self.offset)
        state = {"offset": confirmed, "alarms_told": self._alarms_reported, "flow_runs": self._flow_runs}
        write_whole(self._place, json.dumps(state))


def known(folder: RunFolder) -> list[str]:
    """Ids of the flow runs that followed this run, the first one first."""
    return list(_saved(folder).get("flow_runs", []))


def _saved(folder: RunFolder) -> dict[str, Any]:
    place = folder.root / _STATE_FILE
    return json.loads(place.read_text()) if place.exists() else {}


def _completed(flow_runs: list[str]) -> set[str]:
    """Names of the completed task runs of flow runs; a server that does not know these flow runs has none."""
    ours = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(one) for one in flow_runs]))
    completed = TaskRunFilterStateType(any_=[StateType.COMPLETED])
    done = TaskRunFilter(state=TaskRunFilterState(type=completed, name=None))

    def ask(client: SyncPrefectClient) -> set[str]:
        found: set[str] = set()
        offset = 0
        while page := client.read_task_runs(flow_run_filter=ours, task_run_filter=done, limit=_PAGE, offset=offset):
            found |= {one.name for one in page}
            offset += len(page)
        return found

    return wait_through_outage(ask, "the look for what was recorded before")


def _by_id(client: SyncPrefectClient, ids: list[UUID]) -> dict[UUID, TaskRun]:
    found = client.read_task_runs(task_run_filter=TaskRunFilter(id=TaskRunFilterId(any_=ids)))
    return {one.id: one for one in found}
