"""A training that waits for another one shows it: in the log, the terminal, and an artifact and tag of its flow run."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from dapo.runtime.turn import ClusterHolder
from tasks.progress import StageProgress, best_effort, notify
from tasks.watch import CancelWatcher

WAITING = "waiting"
"""Tag of a flow run that waits. Not a state of its own: each would count as another attempt of the run."""
_REPORT_AGAIN_S, _AT_MOST_S = 60.0, 900.0


class CancelledWhileWaiting(Exception):
    """The flow run was cancelled while it waited."""


class Turn:
    """Called with the run ahead for as long as there is one; logs at once, then more and more rarely.

    Use it as a context manager: on leaving, the flow run no longer counts as waiting.
    """

    def __init__(self) -> None:
        self._ids = [one for one in (flow_run.id, flow_run.parent_flow_run_id) if one]
        self._watch: CancelWatcher | None = None
        self._job, self._reported_at, self._pause = "", 0.0, _REPORT_AGAIN_S

    def __call__(self, ahead: ClusterHolder) -> None:
        """Raises CancelledWhileWaiting where the flow run was cancelled."""
        if self._watch is None:
            self._watch = CancelWatcher(*self._ids, every_s=3.0).__enter__()
        if self._watch.cancelled.is_set():
            raise CancelledWhileWaiting(f"cancelled while it waited for {ahead}")
        if ahead.job != self._job:
            self._job, self._pause = ahead.job, _REPORT_AGAIN_S
        elif time.monotonic() - self._reported_at < self._pause:
            return
        else:
            self._pause = min(2 * self._pause, _AT_MOST_S)
        self._reported_at = time.monotonic()
        words = f"for {ahead}"
        get_run_logger().info("one at a time on a cluster: waiting %s", words)
        notify(StageProgress("waiting", "running", detail=words))
        best_effort(create_markdown_artifact, f"Waits {words}", key=WAITING, description="One at a time on a cluster")
        best_effort(self._tag, True)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._watch is None:
            return
        self._watch.__exit__()
        best_effort(self._tag, False)
        notify(StageProgress("waiting", "done"))
        self._watch, self._job = None, ""

    def _tag(self, waits: bool) -> None:
        with get_client(sync_client=True) as client:
            for one in map(UUID, self._ids):
                tags = set(client.read_flow_run(one).tags)
                client.update_flow_run(one, tags=sorted(tags | {WAITING} if waits else tags - {WAITING}))
