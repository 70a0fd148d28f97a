"""One training or evaluation with devices at a time per cluster: which one holds it, since when, and its progress.

The cluster's job list decides, not a lock: a job that died holds nothing, whatever became of its flow.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from dapo.config.run import RunConfig
from dapo.eval.evaluate import EvaluationFolder
from dapo.observe.journal import read
from dapo.observe.run_folder import RunFolder
from dapo.runtime.dashboard import TERMINAL, Dashboard

TRAINING = "training"
EVALUATION = "evaluation"
"""Values of a job's metadata `kind`."""
TAKEN = "taken"
"""Value of the metadata `turn` of a job that nobody else may run beside."""


@dataclass(frozen=True, slots=True)
class ClusterHolder:
    """The training or evaluation that has the cluster."""

    job: str
    run: RunFolder
    since: float
    """Seconds since the epoch."""

    def __str__(self) -> str:
        day = "%H:%M" if time.time() - self.since < 12 * 3600 else "%Y-%m-%d %H:%M"
        return (
            f"{self.run.id} (job {self.job}), which runs since {datetime.fromtimestamp(self.since):{day}}{self._far()}"
        )

    def _far(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            prompts = json.loads(EvaluationFolder(self.run.root).progress.read_text())
            return f": prompt {prompts['done']} of {prompts['total']}"
        started = total = last = None
        for event in read(self.run.journal):
            match event.kind:
                case "started":
                    started, total, last = event.step, event.data["total_steps"], None
                case "step":
                    last = event
        if started is None:
            return "" if self.run.journal.parent.is_dir() else "; its folder cannot be read from here"
        if last is None:
            return f": before step {started + 1} of {total}"
        minutes = last.data["seconds_left"] / 60
        return (
            f": step {last.step} of {total}, about {minutes:.0f} min left"
            if minutes >= 1
            else f": step {last.step} of {total}"
        )


def live_jobs(cluster: Dashboard) -> list[dict[str, Any]]:
    """Jobs of ours that are pending or running."""
    return [job for job in cluster.jobs() if job["status"] not in TERMINAL and (job.get("metadata") or {}).get("kind")]


def takes_turn(config: RunConfig, cluster: Dashboard) -> bool:
    """Whether an evaluation needs devices of which a training leaves none, and which a training needs; never CPUs."""
    if config.device != "auto":
        return config.device != "cpu"
    return any(node["resources_total"].get(kind) for node in cluster.nodes() for kind in ("GPU", "NPU"))


def cluster_holder(cluster: Dashboard, run: RunFolder, job: str = "") -> ClusterHolder | None:
    """Whom `run` has to wait for; None where the cluster is free, or has this run itself.

    Args:
        job: submission id of this run's own job: then only what was submitted before it.
    """
    live = [one for one in live_jobs(cluster) if one["metadata"].get("turn") == TAKEN]
    live.sort(key=lambda one: (one["start_time"], one["submission_id"]))
    before = itertools.takewhile(lambda one: one["submission_id"] != job, live)
    others = [one for one in before if one["metadata"]["run"] != run.id]
    if not others:
        return None
    first = others[0]
    folder = RunFolder(Path(first["metadata"]["folder"]))
    return ClusterHolder(first["submission_id"], folder, first["start_time"] / 1000)


@contextlib.contextmanager
def looking(config: RunConfig) -> Iterator[None]:
    """A lock from the look at the cluster to the submission, against others of this `run_root`."""
    root = Path(config.run_root).resolve()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".submitting"):
        yield
