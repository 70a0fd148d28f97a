"""`dapo down`: the end of what `dapo up` started, and of nothing else. Training goes on unless it is asked to stop."""

from __future__ import annotations

import time
from uuid import UUID

from dapo.config.run import RunConfig
from dapo.errors import TrainingError
from dapo.observe.journal import read
from dapo.observe.run_folder import RunFolder
from dapo.runtime import cluster
from dapo.runtime.turn import TRAINING
from flows.server import answers
from flows.up import Stack

_REPORT_EVERY_S = 10.0
_WORKER_GRACE_S = 30.0


def down(stack: Stack, *, stop_runs: bool, end_ray: bool, wait_s: float) -> None:
    """End workers, MLflow and server that have a record here, and the local Ray where nothing uses it.

    Args:
        stack: of the project's folder.
        stop_runs: trainings of this folder's local Ray save a checkpoint and end first.
        end_ray: the local Ray ends whoever uses it.
        wait_s: for them.

    Raises:
        TrainingError: a training did not stop in time; nothing else was ended.
    """
    with stack.locked():
        workers = [stack.worker(pool) for pool in stack.pools]
        reachable = answers(stack.api)
        if reachable:
            stack.talk_to_server()
        if stop_runs:
            _stop_trainings(stack, reachable, wait_s)
        for worker in workers:
            ended = worker.stop(_WORKER_GRACE_S)
            stack.say(f"{worker.title}: {'ended' if ended else 'not started here'}")
        if reachable:
            from flows.recovery import sweep

            for name in sweep():
                stack.say(f"  flow run {name}: its process ended with the worker; it comes back with the next one")
        for service in (stack.mlflow, stack.server):
            stack.say(f"{service.title}: {'ended' if service.stop() else 'not started here'}")
        _end_ray(stack, end_ray)


def _stop_trainings(stack: Stack, reachable: bool, wait_s: float) -> None:
    """Ask trainings to stop, and wait until none is left, nor a flow run that followed or waited for one."""
    asked: set[RunFolder] = set()
    cancelled: set[UUID] = set()
    if reachable:
        from flows.pool import cancel_waiting, following
        from tasks.journal_relay import known

        for pool in stack.pools:
            for run in cancel_waiting(pool):
                stack.say(f"  flow run {run.name}: waited for another training; cancelled")
                cancelled.add(run.id)
    begun, reported_at = time.monotonic(), float("-inf")
    while True:
        trainings = _trainings(stack)
        for folder in trainings:
            asked.add(folder)
            # Again each time: a job that was just started has removed an earlier one's request.
            if not folder.stop_request.exists():
                folder.stop_request.write_text("dapo down --stop-runs\n")
        flows = []
        if reachable and any(stack.worker(pool).running() for pool in stack.pools):
            # They have their report to write and their numbers to send when the job has ended.
            ours = cancelled | {UUID(one) for folder in asked for one in known(folder)}
            flows = [run.name for pool in stack.pools for run in following(pool, ours)]
        if not trainings and not flows:
            return
        if time.monotonic() - begun > wait_s:
            left = ", ".join([folder.id for folder in trainings] or flows)
            raise TrainingError(
                f"{left} did not stop within {wait_s:.0f} s, and nothing was ended. It stops when its phase is done: "
                f"`dapo down --stop-runs --wait {2 * wait_s:.0f}` waits on, `dapo down` leaves it running"
            )
        if time.monotonic() - reported_at > _REPORT_EVERY_S:
            reported_at = time.monotonic()
            for folder in trainings:
                stack.say(f"  {folder.id}: asked to save a checkpoint and stop; {_last_word(folder)}")
            if not trainings:
                stack.say(f"  flow run {', '.join(flows)}: ends")
        time.sleep(0.5)


def _end_ray(stack: Stack, whoever_uses_it: bool) -> None:
    config = RunConfig(run_root=str(stack.runs))
    if not cluster.local_pids(config):
        return
    if whoever_uses_it:  # not asked how it is: it may no longer answer
        left = cluster.stop_local(config)
        stack.say(f"Ray: {'ended' if not left else f'process {left[0].pid} of another user cannot be ended'}")
        return
    trainings = _trainings(stack)
    if trainings:
        stack.say(
            f"training {', '.join(f.id for f in trainings)} goes on: `dapo status` shows it, `dapo up` follows it"
        )
        stack.say("  again, `dapo down --stop-runs` stops it with a checkpoint")
        return
    users = cluster.end_unused(config)
    stack.say(f"Ray: {f'{users} uses it, it stays' if users else 'ended'}")


def _trainings(stack: Stack) -> list[RunFolder]:
    return [job.run for job in cluster.local_jobs(RunConfig(run_root=str(stack.runs))) if job.kind == TRAINING]


def _last_word(folder: RunFolder) -> str:
    last = list(read(folder.journal))[-1:]
    if not last:
        return "it loads"
    phase = f", {last[0].data['phase']}" if last[0].kind == "progress" else ""
    return f"step {last[0].step}{phase}"
