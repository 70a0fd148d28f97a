"""What may end a training from outside: a cancelled flow run, a signal. And the job's log on its way to Prefect."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from pathlib import Path
from typing import Any
from uuid import UUID

log = logging.getLogger("dapo.tasks")

_LINES, _PER_S = 40, 10.0


class CancelWatcher:
    """Asks for our own flow run's state: the worker's way to tell us is lost when worker or server die in between.

    Args:
        flow_run_ids: ours and our parent's, which is the one a user cancels; None where there is no such run, and
            without any nothing is ever cancelled.
        every_s: seconds between two questions.
    """

    def __init__(self, *flow_run_ids: str | None, every_s: float = 5.0) -> None:
        self.flow_run_ids, self.every_s = [UUID(one) for one in flow_run_ids if one], every_s
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
                            return
            except Exception as error:
                # httpx', Prefect's and pydantic's errors: the server is away, and is asked again.
                log.debug("the flow run's state is not known: %s", error)
                self._end.wait(self.every_s)


class LogStream:
    """Passes a growing log file on, line by line, at most so many lines in so many seconds."""

    def __init__(self, path: Path, logger: Any) -> None:
        self.path, self.logger = path, logger
        self._offset = path.stat().st_size if path.exists() else 0
        self._window, self._sent, self._left_out = time.monotonic(), 0, 0

    def pump(self) -> None:
        """Send what was written since the last call; the rest of a flood is counted, not sent."""
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
