"""The record of a Ray head on this machine (`head.json` in its state folder), and the jobs on it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from dapo.errors import EnvironmentCheckError
from dapo.files import write_whole
from dapo.observe.run_folder import RunFolder
from dapo.runtime import processes
from dapo.runtime.dashboard import Dashboard, DashboardAway
from dapo.runtime.turn import EVALUATION, TRAINING, live_jobs

_MODULES = {"dapo.runtime.job": TRAINING, "dapo.runtime.evaluation_job": EVALUATION}


@dataclass(frozen=True, slots=True)
class LocalHead:
    """A Ray head of ours, as recorded in its state file."""

    address: str
    mark: str
    """Value of an environment variable that all its processes inherit."""
    temp_dir: str
    users: tuple[int, ...]
    """Processes after the last of which it ends; empty: it stays until somebody stops it."""


@dataclass(frozen=True, slots=True)
class LiveJob:
    """A job of ours that is pending or running."""

    kind: str
    run: RunFolder
    """Of a training its run's folder, else an evaluation's."""


def remembered(place: Path) -> LocalHead | None:
    """The head of the state folder `place`, whether or not it lives."""
    try:
        saved = json.loads((place / "head.json").read_text())
        return LocalHead(saved["address"], saved["mark"], saved["temp_dir"], tuple(saved["users"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(place: Path, head: LocalHead) -> None:
    """Replace the record atomically."""
    write_whole(place / "head.json", json.dumps(asdict(head)))


def forget(place: Path) -> None:
    (place / "head.json").unlink(missing_ok=True)


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """One starter or stopper at a time, over processes and threads."""
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        yield


def answering(place: Path, head: LocalHead) -> Dashboard | None:
    """Its dashboard; None while it does not answer."""
    dashboard = Dashboard(head.address, (place / "token").read_text(), local=True)
    try:
        dashboard.version()
    except (DashboardAway, EnvironmentCheckError):  # gone, and perhaps another program has its port now
        return None
    return dashboard


def jobs(place: Path, head: LocalHead) -> list[LiveJob]:
    """Jobs on it: from its dashboard, or from its processes where that does not answer."""
    dashboard = answering(place, head)
    if dashboard is not None:
        with contextlib.suppress(DashboardAway):
            metadata = [job["metadata"] for job in live_jobs(dashboard)]
            return [LiveJob(entry["kind"], RunFolder(Path(entry["folder"]))) for entry in metadata]
    found = []
    for process in processes.family(head.mark):
        command = processes.command(process.pid)
        kind = next((kind for module, kind in _MODULES.items() if module in command), None)
        if kind is not None:
            found.append(LiveJob(kind, RunFolder(Path(command[-1]))))
    return found
