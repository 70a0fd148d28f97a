"""The journal: what a run did, one JSON object a line, append-only, in the run folder. The one record of a run.

The training job writes it; the Prefect flow, the MLflow shipper and the report read it, each with an offset of its own.
Training does not depend on any of them.

Exactly once: an event of kind `step`, `validation` or `checkpoint` is written once per step. A resumed run redoes the
steps after its checkpoint; what the journal already has of them is not written again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["started", "progress", "step", "validation", "checkpoint", "alarm", "ended"]
ONCE_PER_STEP = {"step", "validation", "checkpoint"}


@dataclass(frozen=True, slots=True)
class Event:
    """One line.

    `data` by kind:
        started: run_id, attempt, total_steps, derived (numbers that follow from the configuration)
        progress: phase (loading | generate | reward | logprobs | update | wait_for_engine | sync | validate |
            checkpoint), done, total (counts)
        step: metrics {name: number} (docs/metrics.md), seconds_left (estimate)
        validation: metrics {name: number}, table (path of samples, relative to the run folder)
        checkpoint: path (relative), metrics, best (bool), seconds (until it was whole), waited (of these, by training)
        alarm: name, message
        ended: status (finished | stopped | failed), reason; error (class name) where it failed
    """

    kind: Kind
    step: int
    data: Mapping[str, Any]
    time: float = 0.0
    """Seconds since the epoch."""

    def line(self) -> str:
        return json.dumps({"kind": self.kind, "step": self.step, "time": self.time, "data": self.data}) + "\n"


class Journal:
    """The writing side; one writer per run (the controller)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        _drop_half_line(path)
        self._written = {(e.kind, e.step) for e in read(path) if e.kind in ONCE_PER_STEP}

    def append(self, kind: Kind, step: int, **data: Any) -> bool:
        """Write one event and flush it to disk; False where it was there already (`ONCE_PER_STEP`)."""
        if (kind, step) in self._written:
            return False
        # Generation ahead of its step writes from a thread of its own.
        with self._lock, self.path.open("a") as file:
            file.write(Event(kind, step, data, time.time()).line())
            file.flush()
            if kind != "progress":
                os.fsync(file.fileno())
        if kind in ONCE_PER_STEP:
            self._written.add((kind, step))
        return True


def read(path: Path, offset: int = 0) -> Iterator[Event]:
    """All whole events from a byte offset on; an incomplete last line (being written) is left for the next call."""
    for event, _ in follow(path, offset):
        yield event


def follow(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Whole events from `offset` on, each with the offset behind it (to be kept and passed to the next call).

    Ends at the end of the file; call again for what came later. A line that is not an event is skipped.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                raw = json.loads(line)
                event = Event(raw["kind"], raw["step"], raw["data"], raw["time"])
            except (ValueError, KeyError, TypeError):
                continue
            yield event, offset


def _drop_half_line(path: Path) -> None:
    """A process killed while writing leaves half a line; the next event must start on a line of its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def last_start(path: Path) -> int:
    """Offset behind the newest attempt's `started`; 0 before the first one."""
    return max((behind for event, behind in follow(path) if event.kind == "started"), default=0)


def last_end(path: Path) -> Event | None:
    """The `ended` event of the newest attempt; None while it has none."""
    last: Event | None = None
    for event in read(path):
        if event.kind in ("started", "ended"):
            last = event
    return last if last is not None and last.kind == "ended" else None


def more(path: Path, offset: int) -> bool:
    """Whether there is a whole event behind `offset`."""
    return next(follow(path, offset), None) is not None
