"""The training stage: the Ray job is submitted, or found running; its journal becomes task runs, artifacts and events.

Training does not need this process: if it is killed, the job goes on, and the next flow run reads on where this one
stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, State

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.errors import TrainingError
from dapo.observe import manifest
from dapo.observe.journal import follow, last_end, read
from dapo.observe.run_folder import RunFolder
from dapo.runtime.turn import ClusterHolder
from tasks.journal_relay import JournalRelay, known
from tasks.progress import StageProgress, best_effort, notify
from tasks.turn import CancelledWhileWaiting, Turn
from tasks.watch import CancelWatcher, LogStream, followed, only_follower

STOP_GRACE_S = 25.0
"""A checkpoint's chance before the job is killed: Prefect kills a cancelled flow's process after 30 s."""


@task(task_run_name="train-{config.name}", cache_policy=NO_CACHE, persist_result=False)
def train(config: RunConfig, data: str, weights: str) -> str:
    """Train to the configured end; returns `finished`, `stopped`, or why it gave up before it was its turn.

    Call it directly (not `.submit`): then signals and time limits reach it in the main thread.

    Args:
        config: the run.
        data: folder of prepared data.
        weights: Hugging Face folder.
    """
    log = get_run_logger()
    with only_follower(RunFolder.of(config), log):
        return _train(config, Path(data), Path(weights), log)


def _train(config: RunConfig, data: Path, weights: Path, log: Any) -> str:
    from dapo.observe.shipper import Shipper
    from dapo.runtime.cluster import connect
    from dapo.runtime.mirror import require_unused
    from dapo.runtime.ray_job import RayJob, already_finished

    end = already_finished(config)
    job = None if end else RayJob(connect(config), RunFolder.of(config), config)
    if job is not None and config.train.resume == "never" and not job.running():
        if config.train.mirror:
            require_unused(config.train.mirror, RunFolder.of(config))
        put_aside(RunFolder.of(config))
    folder = make_folder(config, data, weights)
    records = JournalRelay(folder, config)
    shipper = Shipper(folder, config).start()
    turn = Turn()
    try:
        if job is None:
            log.info("skipped: %s finished step %d, and nothing that decides it has changed", folder.id, end)
            notify(StageProgress("train", "skipped", detail=f"{folder.id} finished step {end} before"))
            for event, offset in follow(folder.journal, records.offset):
                records.take(event, offset)
            return "finished"
        while True:
            with turn:
                submitted = job.start(turn)
            words = "submitted %s to %s" if submitted else "%s runs already on %s; it is followed"
            log.info(words, job.id, job.cluster.address)
            status = _follow(job, records, turn, log)
            asked = _steps_asked_of_newest_attempt(folder)
            if status == "stopped" or asked >= config.train.steps:
                return status
            log.info("that job was asked for %d steps; now it is %d", asked, config.train.steps)
    except CancelledWhileWaiting as cancelled:
        return str(cancelled)
    finally:
        records.finish()
        if not shipper.close():
            log.warning("MLflow has not received everything; the next run of this configuration sends the rest")


def stopped(config: RunConfig) -> State[Any]:
    """Final state of a flow run whose training stopped early: cancelled where that was requested.

    Raises:
        TrainingError: it was not requested: the controller gave up; the message has the reason.
    """
    folder = RunFolder.of(config)
    end = last_end(folder.journal)
    if end is None:
        return Cancelled(message="ended before it could save; run again to go on from the last checkpoint")
    if not folder.stop_request.exists():
        raise TrainingError(f"training stopped at step {end.step}: {end.data['reason']}. Report: {folder.report}")
    return Cancelled(message=f"stopped at step {end.step} ({end.data['reason']}); run again to go on")


def stop_running_job(config: RunConfig) -> None:
    """End this run's job, wherever it was submitted from, with a checkpoint if it can be written within `STOP_GRACE_S`.

    Nothing happens where none runs, or where another flow run follows it.
    """
    from dapo.runtime.cluster import connect, find_local
    from dapo.runtime.ray_job import RayJob

    if followed(RunFolder.of(config)):
        return
    cluster = connect(config) if config.ray.address else find_local(config)
    if cluster is None:
        return
    job = RayJob(cluster, RunFolder.of(config), config)
    if found := job.running():
        job.id = found
        if config.ray.cancel != "now":
            # Asked by Ray alone it has as long as that cluster's head was started with: 3 s by default.
            job.request_stop("the flow run was cancelled")
            if job.wait(STOP_GRACE_S):
                return
        job.kill()


def as_begun(config: RunConfig) -> RunConfig:
    """For a flow run's later attempt: it goes on with the run that it began, from the beginning or not."""
    if config.train.resume == "never" and flow_run.id in known(RunFolder.of(config)):
        return io.override(config, {"train.resume": "auto"})
    return config


def put_aside(folder: RunFolder) -> None:
    """Move an earlier run of the same configuration out of the way, for one from the beginning."""
    if not folder.journal.exists():
        return
    aside = folder.root.with_name(f"{folder.id}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    aside.mkdir()
    for entry in folder.root.iterdir():
        if entry.name != "flow.log":  # the flow that does this writes to it
            entry.rename(aside / entry.name)


def _steps_asked_of_newest_attempt(folder: RunFolder) -> int:
    """From the journal itself: the event may lie before the place where this flow began to read."""
    return max((int(e.data["total_steps"]) for e in read(folder.journal) if e.kind == "started"), default=0)


def make_folder(config: RunConfig, data: Path, weights: Path) -> RunFolder:
    """The run's folder with what the job reads: resolved configuration, inputs, manifest.

    Where the run is mirrored and unknown here, its journal comes from the mirror first.
    The job always resumes from what it finds there: after a crash, too, of a run that was to start from the beginning.
    """
    from dapo.runtime.mirror import restore_records

    folder = RunFolder.of(config)
    folder.root.mkdir(parents=True, exist_ok=True)
    if config.train.mirror and config.train.resume == "auto" and restore_records(config.train.mirror, folder):
        get_run_logger().info("%s is unknown here; its records come from %s", folder.id, config.train.mirror)
    io.save(io.override(config, {"train.resume": "auto"}), folder.config)
    folder.inputs.write_text(json.dumps({"data": str(data.resolve()), "weights": str(weights.resolve())}))
    manifest.write(folder, data, weights)
    return folder


def _follow(job: Any, records: JournalRelay, turn: Turn, log: Any) -> str:
    """Read the journal to its end; a cancelled flow run or Ctrl-C stops the job, the death of a worker does not."""
    stream = LogStream(records.folder.job_log, log)
    stop = _Stop(job)
    with CancelWatcher(flow_run.id, flow_run.parent_flow_run_id) as watch:

        def idle() -> None:
            stream.pump()
            records.confirm()
            if watch.cancelled.is_set():
                stop.press("the flow run was cancelled")

        try:
            with turn:
                return _take_all(job, records, idle, watch.cancelled.is_set, turn)
        except KeyboardInterrupt:
            _take_all(job, records, lambda: stop.press("interrupted by the user"), lambda: True)
            raise
        except TerminationSignal:
            # A stopping worker sends the same signal as a cancelled run; only the latter ends the training.
            if watch.cancelled.is_set() or best_effort(watch.ask):
                return _take_all(job, records, lambda: stop.press("the flow run was cancelled"), lambda: True)
            raise
        finally:
            job.keep_output()
            stream.pump()


def _take_all(
    job: Any,
    records: JournalRelay,
    idle: Callable[[], None],
    asked_to_stop: Callable[[], bool],
    waiting: Callable[[ClusterHolder], None] = lambda ahead: None,
) -> str:
    """`finished` or `stopped`; a job that failed after it was asked to stop counts as stopped and is not restarted."""
    status = "stopped"
    for event, offset in job.follow(records.offset, idle, asked_to_stop, waiting):
        records.take(event, offset)
        if event.kind == "ended":
            status = str(event.data["status"])
    return "finished" if status == "finished" else "stopped"


class _Stop:
    """Asks the job repeatedly to save a checkpoint and end; kills it after a time limit."""

    def __init__(self, job: Any) -> None:
        self.job = job
        self._pressed_at: float | None = None

    def press(self, reason: str) -> None:
        if self._pressed_at is None:
            self._pressed_at = time.monotonic()
            notify(StageProgress("train", "running", detail="stopping: waiting for a checkpoint"))
            if self.job.config.ray.cancel == "now":
                self._pressed_at -= STOP_GRACE_S
        self.job.request_stop(reason)
        if time.monotonic() - self._pressed_at > STOP_GRACE_S:
            self.job.kill()
            self._pressed_at = time.monotonic()
