"""Progress of a stage: for Prefect (an artifact that moves), the log, and watchers in this process."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

log = logging.getLogger("dapo.tasks")
P = ParamSpec("P")
T = TypeVar("T")

_ARTIFACT_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class StageProgress:
    """State of a stage of the flow at one moment."""

    name: str
    state: str
    """running | done | skipped | failed"""
    done: int = 0
    total: int = 0
    detail: str = ""


watchers: list[Callable[[StageProgress], None]] = []
"""Called from the threads of the tasks; must be quick."""


def notify(stage: StageProgress) -> None:
    """Call every watcher of this process."""
    for watcher in watchers:
        watcher(stage)


def best_effort(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Prefect's bookkeeping (artifacts, events) must never stop a run that costs device-days.

    Any exception is answered by a warning: the client raises its own, httpx' and pydantic's.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:
        name = getattr(function, "__name__", str(function))
        log.warning("Prefect: %s skipped: %s: %s", name, type(error).__name__, str(error)[:200])
        return None


def artifact_key(*parts: str) -> str:
    """Prefect takes lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


class ProgressBar:
    """A stage's progress artifact, updated at most every few seconds, and its watchers, called every time."""

    def __init__(self, stage: str, description: str) -> None:
        from prefect.artifacts import create_progress_artifact

        self.stage, self.description = stage, description
        self._artifact: Any = best_effort(
            create_progress_artifact, 0.0, key=artifact_key(stage), description=description
        )
        self._updated = time.monotonic()

    def __call__(self, done: int, total: int, detail: str = "") -> None:
        notify(StageProgress(self.stage, "running", done, total, detail))
        if total and time.monotonic() - self._updated > _ARTIFACT_EVERY_S:
            self._update(100.0 * done / total, detail)

    def close(self, detail: str = "") -> None:
        notify(StageProgress(self.stage, "done", detail=detail))
        self._update(100.0, detail)

    def _update(self, percent: float, detail: str) -> None:
        from prefect.artifacts import update_progress_artifact

        self._updated = time.monotonic()
        if self._artifact is not None:
            text = f"{self.description}: {detail}" if detail else self.description
            best_effort(update_progress_artifact, self._artifact, min(percent, 100.0), text)
