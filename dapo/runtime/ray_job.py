"""The Ray job of a run or an evaluation: submit or find it, follow its journal, restart it after a crash, stop it.

Progress is read from the journal in the run folder only; Ray is asked only whether the job still exists.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dapo.config.run import RunConfig
from dapo.errors import TrainingError
from dapo.observe.journal import Event, follow, last_end, last_start, more, read
from dapo.observe.run_folder import RunFolder
from dapo.runtime.cluster import connect, local_pids
from dapo.runtime.dashboard import TERMINAL, AlreadySubmitted, Dashboard, DashboardAway, UnknownJob
from dapo.runtime.submission import submit
from dapo.runtime.telemetry import TELEMETRY_OFF
from dapo.runtime.turn import TAKEN, TRAINING, ClusterHolder, cluster_holder, looking

log = logging.getLogger(__name__)

ENTRYPOINT = ("-m", "dapo.runtime.job")
POLL_S = 0.5
STATUS_EVERY_S = 3.0
SILENCE_S = 600.0
LEAVE_S = 60.0
TURN_EVERY_S = 2.0
BACK_OFF_S = (5.0, 30.0, 120.0)
# What is written into the code or the configuration is there again after a restart.
_LASTING = {
    "ConfigError",
    "DataError",
    "WeightsError",
    "EnvironmentCheckError",
    "ProofError",
    "RewardError",
    "StarvationError",
}


class RayJob:
    """One run's job on one cluster.

    Args:
        cluster: where it runs.
        run: the run's folder; the cluster's nodes see it under the same path.
        config: `ray.env`, `ray.restarts`.
        entrypoint: arguments of the Python that is started with the run folder behind them.
        back_off_s: pauses before the first, second, ... restart; the last one repeats.
        kind: stored with the job in the cluster, like `owner`: who asked for it.
        turn: waits until nobody else who takes a turn has the cluster.
    """

    def __init__(
        self,
        cluster: Dashboard,
        run: RunFolder,
        config: RunConfig,
        *,
        entrypoint: Sequence[str] = ENTRYPOINT,
        back_off_s: Sequence[float] = BACK_OFF_S,
        kind: str = TRAINING,
        turn: bool = True,
        owner: str = "",
    ) -> None:
        self.cluster, self.run, self.config = cluster, run, config
        self.entrypoint, self.back_off_s = tuple(entrypoint), tuple(back_off_s)
        self.kind, self.turn, self.owner = kind, turn, owner
        self.id = ""
        self._fence = 0  # an `ended` event before this place in the journal is an earlier attempt's

    def running(self) -> str | None:
        """Submission id of this run's job where one is pending or running."""
        live = [job["submission_id"] for job in self._jobs() if job["status"] not in TERMINAL]
        return live[0] if live else None

    def start(self, waiting: Callable[[ClusterHolder], None] = lambda ahead: None) -> bool:
        """Submit the next attempt, or take over the one that runs; True where it was submitted.

        Args:
            waiting: called every `TURN_EVERY_S` seconds while somebody else has the cluster; raises to give up.
        """
        away_since: float | None = None
        submitted = False
        while True:
            try:
                with looking(self.config):
                    other = self._ahead(submitted)
                    if other is None and not submitted:
                        submitted = self._start()
                        # Another `run_root` may have looked at the same moment: the later submission withdraws.
                        other = self._ahead(submitted) if submitted else None
                    if other is None:
                        return submitted
                    if submitted:
                        self.end()
                        submitted = False
                away_since = None
                waiting(other)
            except DashboardAway as away:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > SILENCE_S:
                    raise
                log.warning("%s; asked again", away)
                if self.cluster.local:  # it may have ended with the training that we waited for
                    self.cluster = connect(self.config)
            time.sleep(TURN_EVERY_S)

    def _ahead(self, submitted: bool) -> ClusterHolder | None:
        return cluster_holder(self.cluster, self.run, self.id if submitted else "") if self.turn else None

    def _start(self) -> bool:
        found = self.running()
        waited_until = time.monotonic() + LEAVE_S
        while found and last_end(self.run.journal) is not None and time.monotonic() < waited_until:
            # It has written its `ended` event and is about to exit; or it is new and has written nothing yet.
            time.sleep(POLL_S)
            found = self.running()
        if found:
            self.id, self._fence = found, last_start(self.run.journal)
            return False
        known = [int(job["submission_id"].rpartition("-")[2]) for job in self._jobs()]
        started = sum(event.kind == "started" for event in read(self.run.journal))
        self.id = f"dapo-{self.run.id}-{1 + max([started, *known])}"
        self._fence = self.run.journal.stat().st_size if self.run.journal.exists() else 0
        self.run.stop_request.unlink(missing_ok=True)
        metadata = {"run": self.run.id, "folder": str(self.run.root), "kind": self.kind, "owner": self.owner}
        metadata["turn"] = TAKEN if self.turn else ""
        arguments = [*self.entrypoint, str(self.run.root)]
        try:
            submit(self.cluster, self.id, arguments, TELEMETRY_OFF | dict(self.config.ray.env), metadata)
        except AlreadySubmitted:
            return False  # another follower of this run was faster; the id is the same
        return True

    def follow(
        self,
        offset: int = 0,
        idle: Callable[[], None] = lambda: None,
        asked_to_stop: Callable[[], bool] = bool,
        waiting: Callable[[ClusterHolder], None] = lambda ahead: None,
    ) -> Iterator[tuple[Event, int]]:
        """Events from `offset` on, each with the offset behind it, to the end of the run.

        A job that is gone without an `ended` event is started again, `ray.restarts` times.

        Args:
            offset: where reading begins; earlier attempts' events are given too.
            idle: called between looks at the journal, at least every `POLL_S` seconds.
            asked_to_stop: then a job that failed or is gone is not started again.
            waiting: as in `start`, where somebody else took the cluster before a restart.

        Raises:
            TrainingError: the job failed for a lasting reason, or crashed too often.
        """
        restarts, asked_at, last_word = 0, time.monotonic(), time.monotonic()
        while True:
            for event, behind in follow(self.run.journal, offset):
                offset, last_word = behind, time.monotonic()
                yield event, behind
                if event.kind == "ended" and behind > self._fence:
                    idle()  # a stop request is seen before the job is started again
                    if event.data["status"] != "failed" or asked_to_stop():
                        return
                    if not self._worth_another_try(event.data, restarts):
                        raise TrainingError(f"training failed: {event.data['reason']}. Log: {self.run.job_log}")
                    if not self._again(restarts, event.data["reason"], idle, asked_to_stop, waiting):
                        return
                    restarts += 1
            idle()
            if time.monotonic() - asked_at > STATUS_EVERY_S:
                gone = self._gone()
                asked_at = time.monotonic()
                if gone and not more(self.run.journal, offset):
                    if asked_to_stop():
                        return
                    if restarts >= self.config.ray.restarts:
                        raise TrainingError(
                            f"the training job {self.id} crashed ({gone}) and was started again {restarts} times "
                            f"(ray.restarts={self.config.ray.restarts}). Log: {self.run.job_log}; `dapo run` again "
                            "continues from the last checkpoint"
                        )
                    if not self._again(restarts, gone, idle, asked_to_stop, waiting):
                        return
                    restarts += 1
            if time.monotonic() - last_word > SILENCE_S:
                last_word = time.monotonic()
                log.warning("no journal event from %s for %.0f s; its log: %s", self.id, SILENCE_S, self.run.job_log)
            time.sleep(POLL_S)

    def request_stop(self, reason: str) -> None:
        """Ask for a checkpoint and an end; the controller looks between phases."""
        if not self.run.stop_request.exists():
            self.run.stop_request.write_text(reason + "\n")

    def kill(self) -> None:
        """End the job at once; the next start continues from its last checkpoint."""
        try:
            self.cluster.stop(self.id)
        except (DashboardAway, UnknownJob) as error:
            log.warning("could not stop %s: %s", self.id, error)

    def end(self) -> None:
        """Kill the job and wait until the cluster has it no more.

        Raises:
            DashboardAway: not known.
        """
        self.kill()
        self.wait(LEAVE_S)

    def wait(self, at_most_s: float) -> bool:
        """Whether this run's job has ended within this time; raises DashboardAway."""
        end_at = time.monotonic() + at_most_s
        while self.running():
            if time.monotonic() > end_at:
                return False
            time.sleep(POLL_S)
        return True

    def keep_output(self) -> None:
        """Copy what the job and its workers printed into the run folder: Ray forgets it when the cluster goes."""
        try:
            (self.run.root / f"{self.id}.log").write_text(self.cluster.log(self.id))
        except (DashboardAway, UnknownJob, OSError) as error:
            log.warning("output of %s was not kept: %s", self.id, error)

    def _gone(self) -> str | None:
        """Why the job no longer runs; None while it does, or while that is not known."""
        try:
            job = self.cluster.job(self.id)
        except UnknownJob:
            return "the cluster was started anew and does not know it"
        except DashboardAway as away:
            if self.cluster.local and not local_pids(self.config):
                return "the local Ray is gone"
            log.warning("%s; the journal is still followed", away)
            return None
        if job["status"] == "PENDING" and time.time() - job["start_time"] / 1000 > 60:
            log.warning("job %s still waits in the cluster: %s", self.id, job.get("message", ""))
        return f"{job['status']}: {job.get('message', '')}" if job["status"] in TERMINAL else None

    def _again(
        self,
        restarts: int,
        reason: str,
        idle: Callable[[], None],
        asked_to_stop: Callable[[], bool],
        waiting: Callable[[ClusterHolder], None],
    ) -> bool:
        """Wait a little, then start the next attempt; False where it was asked to stop meanwhile."""
        pause = self.back_off_s[min(restarts, len(self.back_off_s) - 1)]
        log.warning("training job %s: %s; it is started again in %.0f s", self.id, reason, pause)
        self.keep_output()
        while not _asked_within(pause, idle, asked_to_stop):
            try:
                self.cluster = connect(self.config)
                self.start(waiting)
                return True
            except DashboardAway as away:
                pause = self.back_off_s[-1]
                log.warning("%s; asked again in %.0f s", away, pause)
        return False

    def _worth_another_try(self, ended: Mapping[str, Any], restarts: int) -> bool:
        return restarts < self.config.ray.restarts and ended.get("error", "ConfigError") not in _LASTING

    def _jobs(self) -> list[dict[str, Any]]:
        prefix = f"dapo-{self.run.id}-"
        return [j for j in self.cluster.jobs() if j["submission_id"].startswith(prefix)]


def already_finished(config: RunConfig) -> int | None:
    """The step at which this run reached its configured end and may be taken as done; None where there is work."""
    end = last_end(RunFolder.of(config).journal)
    if end is None or end.data["status"] != "finished" or config.train.resume == "never":
        return None
    return end.step if end.step >= config.train.steps else None


def _asked_within(pause_s: float, idle: Callable[[], None], asked_to_stop: Callable[[], bool]) -> bool:
    end_at = time.monotonic() + pause_s
    while True:
        idle()
        if asked_to_stop():
            return True
        if time.monotonic() >= end_at:
            return False
        time.sleep(min(POLL_S, pause_s))
