"""What `dapo run` shows: stages as they begin and end, a line per training step, and the numbers at the end.

From the journal and from the tasks; on a terminal the latest state stays on a moving line below.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from dapo.config.run import RunConfig
from dapo.observe.journal import Event, follow, read
from dapo.observe.run_folder import RunFolder
from tasks.progress import StageProgress

_PLAIN_EVERY_S = 10.0
_TITLES = {
    "prefect": "Prefect",
    "find_cluster": "Ray",
    "prepare_dataset": "data",
    "fetch_weights": "weights",
    "validate_environment": "environment",
    "train": "training",
    "report": "report",
}


class LiveView:
    """Follows one run; `stage` is called by the tasks, the journal is read in a thread between `start` and `stop`."""

    def __init__(self, console: Console, folder: RunFolder, config: RunConfig) -> None:
        self.console, self.folder, self.config = console, folder, config
        self._offset = folder.journal.stat().st_size if folder.journal.exists() else 0
        self._file = _identity(folder.journal)
        self._began = time.monotonic()
        self._latest: dict[str, str] = {}
        self._said: dict[str, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="view")
        self._status: Status | None = console.status("") if console.is_terminal else None

    def start(self) -> None:
        if self._status:
            self._status.start()
        self._thread.start()

    def stop(self) -> None:
        """Show what is left and end the moving line."""
        if self._end.is_set():
            return
        self._end.set()
        self._thread.join()
        if self._status:
            self._status.stop()

    def stage(self, stage: StageProgress) -> None:
        """One report of a task."""
        title = _TITLES.get(stage.name, stage.name)
        if stage.state == "running":
            words = f"{title}: {f'{stage.done}/{stage.total} ' if stage.total else ''}{stage.detail}".rstrip(": ")
            self._moving(stage.name, words)
            return
        self._latest.pop(stage.name, None)
        self._line(f"{title}: {stage.state}{f' ({stage.detail})' if stage.detail else ''}")

    def _loop(self) -> None:
        while True:
            last = self._end.wait(0.3)
            if self._file != (file := _identity(self.folder.journal)):
                # Begun just now, or an earlier one was put aside for a run from the beginning.
                self._file, self._offset = file, 0
            for event, offset in follow(self.folder.journal, self._offset):
                self._offset = offset
                self._event(event)
            if last:
                return

    def _event(self, event: Event) -> None:
        data = event.data
        match event.kind:
            case "started":
                again = f", attempt {data['attempt']}" if data["attempt"] > 1 else ""
                self._line(f"training: {data['total_steps']} steps, starting at step {event.step}{again}")
            case "progress":
                counts = f" {data['done']}/{data['total']}" if data["total"] else ""
                self._moving("train", f"step {event.step + 1}: {data['phase']}{counts}")
            case "step":
                self._line(step_line(event, self.config.train.steps))
            case "validation":
                self._line(f"validation at step {event.step}: accuracy {data['metrics']['val/accuracy']:.3f}")
            case "checkpoint":
                self._line(f"checkpoint at step {event.step}: {self.folder.root / data['path']}")
            case "alarm":
                self._line(f"alarm at step {event.step}: {data['name']}: {data['message']}")
            case "ended":
                self._latest.pop("train", None)
                self._line(f"training: {data['status']} ({data['reason']})")

    def _moving(self, key: str, words: str) -> None:
        self._latest[key] = words
        if self._status:
            self._status.update(" · ".join(self._latest.values()))
        elif key != "train" and time.monotonic() - self._said.get(key, -_PLAIN_EVERY_S) >= _PLAIN_EVERY_S:
            self._said[key] = time.monotonic()
            self._line(words)

    def _line(self, words: str) -> None:
        self.console.print(f"[{time.monotonic() - self._began:5.0f} s] {words}", markup=False, highlight=False)


def step_line(event: Event, steps: int) -> str:
    """A training step in one line."""
    m = event.data["metrics"]
    return (
        f"step {event.step:>{len(str(steps))}}/{steps}  accuracy {_number(m, 'groups/accuracy', 3)}  "
        f"reward {_number(m, 'reward/mean', 3)}  entropy {_number(m, 'train/entropy', 3)}  "
        f"length {_number(m, 'response/length_mean', 1)}  "
        f"kept {_number(m, 'groups/kept', 0)}/{_number(m, 'groups/generated', 0)}  "
        f"{_number(m, 'time/step', 1)} s  left {duration(event.data['seconds_left'])}"
    )


def duration(seconds: float) -> str:
    """For example `1:02:03` or `4:05`."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def closing(folder: RunFolder, config: RunConfig) -> list[str]:
    """The last lines of a run: accuracy before and after, where everything is, what to do next."""
    from dapo.observe.shipper import tracking_uri

    events = list(read(folder.journal))
    validations = [e for e in events if e.kind == "validation"]
    checkpoints = [e for e in events if e.kind == "checkpoint"]
    lines = [""]
    if validations:
        before, after = validations[0], validations[-1]
        lines.append(
            f"Held-out accuracy: {before.data['metrics']['val/accuracy']:.3f} at step {before.step}, "
            f"{after.data['metrics']['val/accuracy']:.3f} at step {after.step}"
        )
    places = {
        "report": folder.report if folder.report.exists() else None,
        "checkpoint": folder.root / checkpoints[-1].data["path"] if checkpoints else None,
        "MLflow": tracking_uri(config),
        "log": folder.job_log if folder.job_log.exists() else None,
    }
    lines += [f"  {name + ':':<12}{place}" for name, place in places.items() if place]
    lines += [
        "Next:",
        f"  mlflow ui --backend-store-uri {tracking_uri(config)}",
        f"  dapo status {folder.root}",
        f"  dapo run {folder.config} train.steps={2 * config.train.steps}",
    ]
    return lines


def _identity(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _number(metrics: Mapping[str, Any], name: str, digits: int) -> str:
    value = metrics.get(name)
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
