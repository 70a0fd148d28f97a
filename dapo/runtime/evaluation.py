"""Measuring a model in a process of its own, here or as a Ray job (`dapo.runtime.evaluation_job`)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from dapo import errors
from dapo.config import io
from dapo.config.run import RunConfig
from dapo.errors import EngineError
from dapo.eval.evaluate import EvaluationFolder
from dapo.observe.run_folder import RunFolder
from dapo.runtime.dashboard import TERMINAL, Dashboard, DashboardAway, UnknownJob
from dapo.runtime.leash import LeashedProcess
from dapo.runtime.telemetry import TELEMETRY_OFF
from dapo.runtime.turn import EVALUATION, ClusterHolder, live_jobs, takes_turn

log = logging.getLogger(__name__)

POLL_S = 0.5
JOB = "dapo.runtime.evaluation_job"

Progress = Callable[[int, int, str], None]


def evaluate(folder: EvaluationFolder, progress: Progress, owner: str = "") -> dict[str, Any]:
    """Measure, or read what was measured before; returns what `metrics.json` holds.

    Args:
        folder: as `dapo.eval.evaluate.make_folder` made it.
        progress: called with finished prompts.
        owner: name under which `stop_jobs` finds its Ray job when we are gone.

    Raises:
        DapoError: what stopped the measuring process.
        EngineError: it died without a word, or made no progress for `rollout.deadline_s`.
    """
    if folder.done:
        return folder.read_metrics()
    config = io.load(folder.config)
    for old in (folder.error, folder.progress):
        old.unlink(missing_ok=True)
    if (cluster := _cluster(config)) is not None:
        _run_as_ray_job(cluster, folder, config, progress, owner)
    else:
        _run_here(folder, config, progress)
    if folder.done:
        return folder.read_metrics()
    if folder.error.exists():
        failure = json.loads(folder.error.read_text())
        raise errors.named(failure["error"], failure["message"], EngineError)
    raise EngineError(f"evaluation {folder.id} ended without a result; see {folder.log}")


def on_ray(config: RunConfig) -> bool:
    """Whether the engine needs a cluster: an address is configured, or several devices are."""
    return config.ray.address is not None or config.model.parallel.world_size > 1


def _cluster(config: RunConfig) -> Dashboard | None:
    """Where it runs as a job; None: in a process here.

    One device needs no cluster, but has to wait for a training that holds it: a local Ray knows that.
    """
    from dapo.runtime.cluster import connect, find_local

    if on_ray(config):
        return connect(config)
    local = find_local(config)
    return local if local is not None and takes_turn(config, local) else None


def stop_jobs(config: RunConfig, owner: str) -> None:
    """End the Ray jobs of this owner's evaluations; a killed process leaves its job and the job's devices behind."""
    from dapo.runtime.cluster import connect, find_local

    cluster = connect(config) if config.ray.address else find_local(config)
    if cluster is None:
        return
    for job in live_jobs(cluster):
        if (job["metadata"]["kind"], job["metadata"].get("owner")) == (EVALUATION, owner):
            cluster.stop(job["submission_id"])


def _run_here(folder: EvaluationFolder, config: RunConfig, progress: Progress) -> None:
    env = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), **os.environ, **TELEMETRY_OFF, **config.ray.env}
    child = LeashedProcess("dapo.runtime.leash", JOB, str(folder.root), env=env, log=folder.log)
    try:
        _watch(folder, config, progress, lambda: folder.done or child.poll() is not None)
    finally:
        child.stop()


def _run_as_ray_job(
    cluster: Dashboard, folder: EvaluationFolder, config: RunConfig, progress: Progress, owner: str
) -> None:
    from dapo.runtime.ray_job import RayJob

    run, entrypoint, turn = RunFolder(folder.root), ("-m", JOB), takes_turn(config, cluster)
    job = RayJob(cluster, run, config, entrypoint=entrypoint, kind=EVALUATION, turn=turn, owner=owner)
    job.start(_waiting(progress))

    def ended() -> bool:
        try:
            return job.cluster.job(job.id)["status"] in TERMINAL
        except UnknownJob:
            return True
        except DashboardAway:
            return False  # asked again; a cluster that is gone for good makes no progress

    try:
        _watch(folder, config, progress, ended)
    finally:
        if not ended():
            with contextlib.suppress(DashboardAway):
                job.end()  # it gives its devices back before anybody goes on
        job.keep_output()


def _waiting(progress: Progress) -> Callable[[ClusterHolder], None]:
    """Reports the run ahead, at once and then at growing intervals."""
    reported_at, pause_s = float("-inf"), 0.0

    def waiting(ahead: ClusterHolder) -> None:
        nonlocal reported_at, pause_s
        if time.monotonic() - reported_at > pause_s:
            reported_at, pause_s = time.monotonic(), min(2 * pause_s + 60.0, 900.0)
            log.info("one at a time on a cluster: waiting for %s", ahead)
            progress(0, 0, f"waits for {ahead}")

    return waiting


def _watch(folder: EvaluationFolder, config: RunConfig, progress: Progress, ended: Callable[[], bool]) -> None:
    last, since = -1, time.monotonic()
    while True:
        over = ended()
        done, total = _how_far(folder)
        if done != last:
            last, since = done, time.monotonic()
            progress(done, total, "prompts" if total else "loading")
        if over:
            return
        if time.monotonic() - since > config.rollout.deadline_s:
            raise EngineError(
                f"evaluation {folder.id} made no progress for rollout.deadline_s={config.rollout.deadline_s:.0f} s at "
                f"prompt {done} of {total} and was ended; see {folder.log}"
            )
        time.sleep(POLL_S)


def _how_far(folder: EvaluationFolder) -> tuple[int, int]:
    try:
        saved = json.loads(folder.progress.read_text())
    except (OSError, ValueError):
        return 0, 0
    return saved["done"], saved["total"]
