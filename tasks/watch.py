"""Watching a training: cancellation of its flow run, the lock of its follower, and its log."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from filelock import FileLock, Timeout
from prefect.runtime import flow_run

from dapo.observe.run_folder import RunFolder
from tasks.progress import best_effort

log = logging.getLogger("dapo.tasks")

_LINES, _PER_S = 40, 10.0
_WORKER_S = 2.0
"""The worker's signal comes sooner, where it comes at all."""


class CancelWatcher:
    """Asks for our own flow run's state: the worker's notification is lost when worker or server die in between.

    Args:
        flow_run_ids: ours and our parent's, which is the one a user cancels; None where there is no such run, and
            without any nothing is ever cancelled.
        every_s: seconds between two questions.
        interrupt: a cancelled flow run ends its main thread's work with the signal that the worker should have sent.
    """

    def __init__(self, *flow_run_ids: str | None, every_s: float = 5.0, interrupt: bool = False) -> None:
        self.flow_run_ids, self.every_s = [UUID(one) for one in flow_run_ids if one], every_s
        # In other threads nothing catches it: Prefect's handler is the main thread's.
        self.interrupt = interrupt and threading.current_thread() is threading.main_thread()
        self.cancelled = threading.Event()
        self._end = threading.Event()
        # Prefect keeps its settings in the context, which a thread does not take over by itself.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._loop,), daemon=True, name="cancel-watcher")

    def __enter__(self) -> CancelWatcher:
        if self.flow_run_ids:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def ask(self, client: Any = None) -> bool:
        """Whether one of the flow runs is cancelled or about to be; raises what the client raises."""
        from prefect.client.orchestration import get_client

        if not self.flow_run_ids:
            return False
        if client is None:
            with get_client(sync_client=True) as client:
                return self.ask(client)
        states = [client.read_flow_run(one).state for one in self.flow_run_ids]
        return any(state is not None and state.type.value in ("CANCELLING", "CANCELLED") for state in states)

    def _loop(self) -> None:
        from prefect.client.orchestration import get_client

        while not self._end.is_set():
            try:
                with get_client(sync_client=True) as client:
                    while not self._end.wait(self.every_s):
                        if self.ask(client):
                            self.cancelled.set()
                            if self.interrupt and not self._end.wait(_WORKER_S):
                                os.kill(os.getpid(), signal.SIGTERM)
                            return
            except Exception as error:
                # httpx', Prefect's and pydantic's errors: the server is away, and is asked again.
                log.debug("the flow run's state is not known: %s", error)
                self._end.wait(self.every_s)


@contextlib.contextmanager
def interrupted_when_cancelled() -> Iterator[None]:
    """Raises Prefect's TerminationSignal within seconds when our flow run, or its parent, is cancelled.

    The worker does the same only once per flow run: a cancellation after a retry it forgets (Prefect 3.7.7).
    """
    with CancelWatcher(flow_run.id, flow_run.parent_flow_run_id, interrupt=True):
        yield


def cancelled() -> bool:
    """Whether our flow run, or its parent, is cancelled or about to be; False where that is not known."""
    return bool(best_effort(CancelWatcher(flow_run.id, flow_run.parent_flow_run_id).ask))


@contextlib.contextmanager
def only_follower(folder: RunFolder, logger: Any) -> Iterator[None]:
    """Two flow runs of one run would report everything twice: the second waits here, then finds it reported."""
    place = _follower(folder)
    place.touch()
    lock = _lock(place)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        logger.info("%s is followed by %s already; waiting for its end", folder.id, place.read_text())
        with interrupted_when_cancelled():
            held = lock.acquire(poll_interval=1.0)
    with held:
        place.write_text(f"flow run {flow_run.name}, process {os.getpid()}")
        yield


def followed(folder: RunFolder) -> bool:
    """Whether a flow run follows this run now."""
    try:
        with _lock(_follower(folder)).acquire(blocking=False):
            return False
    except Timeout:
        return True


class LogStream:
    """Passes a growing log file on, line by line, at most so many lines in so many seconds.

    Begins with the last lines that are there: what a killed follower had read may not have reached Prefect.
    """

    def __init__(self, path: Path, logger: Any) -> None:
        self.path, self.logger = path, logger
        self._offset = _begin_of_last_lines(path) if path.exists() else 0
        self._window, self._sent, self._left_out = time.monotonic(), 0, 0

    def pump(self) -> None:
        """Log what was written since the last call; lines above the limit are counted, not logged."""
        if time.monotonic() - self._window > _PER_S:
            self._window, self._sent = time.monotonic(), 0
            if self._left_out:
                self.logger.info("%d lines more in %s", self._left_out, self.path)
                self._left_out = 0
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                if self._sent < _LINES:
                    self._sent += 1
                    self.logger.info("%s", line.decode(errors="replace").rstrip())
                else:
                    self._left_out += 1


def _begin_of_last_lines(path: Path) -> int:
    """Offset of the last `_LINES` lines, or of fewer if they are long."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        begin = file.seek(max(0, end - 200 * _LINES))
        if begin:
            file.readline()  # cut in two by the seek
        return end - sum(map(len, file.readlines()[-_LINES:]))


def _follower(folder: RunFolder) -> Path:
    place = folder.root.parent / ".followers" / folder.id
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _lock(place: Path) -> FileLock:
    """The lock ends with the process. It is a file of its own: some versions empty the file they lock."""
    return FileLock(f"{place}.lock")
