"""A training run outlives everything round it: flow, worker, Prefect server and MLflow server are killed in mid-run.

What becomes of a flow run is promised in docs/operate.md; here it is held against the servers' own interfaces.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import mlflow
import pytest

from dapo.config import io
from dapo.observe.journal import Event, read
from dapo.observe.run_folder import RunFolder
from tests.e2e.pipeline import SMALL, processes_with
from tests.e2e.servers import REPOSITORY, Servers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS = 300
"""Enough to outlast the four deaths: a step takes a fifth of a second where nothing else runs."""
OFTEN = STEPS // 6
EVENTS = ("validation.completed", "checkpoint.saved", "best.found")
TINY = ("batch.prompts_per_step=4", "batch.group_size=2", "model.parallel.world_size=1")
FREQUENT = (f"train.steps={STEPS}", f"train.test_freq={OFTEN}", f"train.save_freq={OFTEN}")
RARE = ("train.steps=5000", "train.test_freq=0", "train.save_freq=1000", "ray.restarts=1")


class Run:
    """One flow run of `dapo/geo3k-tiny` and the run it trains."""

    def __init__(self, servers: Servers, *overrides: str) -> None:
        places = (f"run_root={servers.home}/runs", f"data.cache_dir={servers.home}/cache")
        given = [*SMALL, *TINY, *places, *overrides]
        self.servers = servers
        self.config = io.load(REPOSITORY / "configs/geo3k_tiny.yaml", given)
        self.folder = RunFolder.of(self.config)
        self.id = servers.run("dapo/geo3k-tiny", given)

    def events(self, *kinds: str) -> list[Event]:
        return [e for e in read(self.folder.journal) if e.kind in kinds]

    def steps(self) -> int:
        return max((e.step for e in self.events("step")), default=0)

    def goes_on(self, without: str) -> None:
        """Training takes another step, and has not ended before."""
        reached = self.steps()
        self.servers.wait_until(
            lambda: self.steps() > reached or self.events("ended"), f"training goes on without {without}"
        )
        assert not self.events("ended"), f"the run was too short: it ended before {without} was missed"

    def reaches(self, state: str, timeout_s: float = 240) -> None:
        def there() -> bool:
            found = self.servers.flow_run(self.id)
            assert found["state_type"] not in {"FAILED"} - {state}, found["state"]["message"]
            return found["state_type"] == state

        self.servers.wait_until(there, f"flow run {self.id} is {state}", timeout_s)

    def follows(self, attempt: int) -> None:
        """The flow run's process of this attempt has found the training."""

        def there() -> bool:
            run = self.servers.flow_run(self.id)
            trains = [t for t in self.servers.task_runs(self.id) if t["name"].startswith("train-")]
            return run["run_count"] == attempt and any(t["state_type"] == "RUNNING" for t in trains)

        self.servers.wait_until(there, f"attempt {attempt} of the flow run follows the training")

    def flow_process(self) -> int:
        return int(self.servers.flow_run(self.id)["infrastructure_pid"].rpartition(":")[2])

    def job_processes(self) -> dict[int, str]:
        found = processes_with(str(self.folder.root))
        return {pid: command for pid, command in found.items() if "dapo.runtime.job" in command}


def recorded(servers: Servers, *flow_runs: str) -> Counter[str]:
    """Completed task runs of validations and checkpoints, by name."""
    names = [t["name"] for one in flow_runs for t in servers.task_runs(one) if t["state_type"] == "COMPLETED"]
    return Counter(name for name in names if name.startswith(("record_validation", "log_checkpoint")))


@pytest.fixture(scope="module")
def survivor(servers):
    """A run in which each of the four was killed once, and what was seen meanwhile."""
    run = Run(servers, "name=survivor", *FREQUENT)
    servers.wait_until(lambda: run.steps() >= 1, "the first step", 300)
    run.follows(1)

    os.kill(run.flow_process(), signal.SIGKILL)
    run.goes_on("the flow's process")
    run.follows(2)

    for victim in ("mlflow", "server", "worker"):
        servers.kill(victim)
        run.goes_on(victim)
    for victim in ("mlflow", "server"):
        servers.launch(victim)
    servers.wait_until(servers.server_answers, "the Prefect server is back")
    servers.wait_until(servers.mlflow_answers, "MLflow is back")
    servers.launch("worker")
    run.reaches("COMPLETED", 900)
    return run


def test_the_flow_run_followed_the_training_to_its_end_in_two_attempts(servers, survivor):
    found = servers.flow_run(survivor.id)
    assert (found["state_type"], found["run_count"]) == ("COMPLETED", 2)


def test_training_was_not_interrupted(survivor):
    assert len(survivor.events("started")) == 1
    assert [e.step for e in survivor.events("step")] == list(range(1, STEPS + 1))


def test_every_validation_and_checkpoint_is_one_completed_task_run(servers, survivor):
    validations = {f"record_validation-step-{e.step}" for e in survivor.events("validation")}
    checkpoints = {f"log_checkpoint-step-{e.step}" for e in survivor.events("checkpoint")}
    assert len(validations) == 7
    assert len(checkpoints) == 6
    assert recorded(servers, survivor.id) == Counter(validations | checkpoints)


def test_mlflow_has_every_metric_validation_and_checkpoint_once(servers, survivor):
    client = mlflow.MlflowClient(servers.mlflow)
    [run] = client.search_runs(["1"], f"tags.`dapo.run_id` = '{survivor.folder.id}'")
    assert run.info.status == "FINISHED"
    history = client.get_metric_history
    assert [m.step for m in history(run.info.run_id, "train/loss")] == list(range(1, STEPS + 1))
    assert [m.step for m in history(run.info.run_id, "val/accuracy")] == list(range(0, STEPS + 1, OFTEN))
    models = client.search_logged_models(["1"], f"source_run_id = '{run.info.run_id}'")
    assert sorted(int(m.params["step"]) for m in models) == list(range(OFTEN, STEPS + 1, OFTEN))
    tables = [a.path for a in client.list_artifacts(run.info.run_id, "validation") if a.path.endswith("00.json")]
    assert "report.html" in {a.path for a in client.list_artifacts(run.info.run_id)}
    assert len(set(tables)) == len(tables)


def test_prefect_shows_progress_links_summary_events_and_the_jobs_log(servers, survivor):
    found = {}
    for artifact in servers.artifacts(survivor.id):
        found.setdefault(artifact["type"], []).append(artifact)
    assert {artifact["data"] for artifact in found["progress"]} >= {100.0}
    page = f"{servers.mlflow}/#/experiments/1/runs/"
    validations = [a for a in found["table"] if "step" in (a["description"] or "")]
    checkpoints = [a for a in servers.artifacts(survivor.id) if (a["description"] or "").startswith("Checkpoint of")]
    assert len(validations) >= 7
    assert len(checkpoints) >= 6
    assert all(page in a["description"] for a in (*validations, *checkpoints))
    [summary] = [a["data"] for a in found["markdown"] if a["key"].startswith("summary-")]
    assert page in summary
    assert any(str(survivor.folder.report) in a["data"] for a in found["markdown"])
    events = {name: servers.events(f"dapo.{name}", survivor.folder.id) for name in EVENTS}
    wanted = {
        "validation.completed": survivor.events("validation"),
        "checkpoint.saved": survivor.events("checkpoint"),
        "best.found": [e for e in survivor.events("validation") if e.data["best"]],
    }
    for name, journalled in wanted.items():
        steps = [e["payload"]["step"] for e in events[name]]
        assert len(set(steps)) == len(steps), "no step is reported twice"
        assert set(steps) <= {e.step for e in journalled}
        # Prefect holds an event in memory while it sends it: what was on its way when the server died is lost.
        assert len(steps) >= len(journalled) - 1
    assert any("dapo.job" in line for line in servers.logs(survivor.id))


@pytest.fixture(scope="module")
def endless(servers):
    """A run that does not end by itself, followed by its flow run."""
    run = Run(servers, "name=endless", *RARE)
    servers.wait_until(lambda: run.steps() >= 1, "the first step", 300)
    run.follows(1)
    return run


def test_a_stopped_worker_does_not_stop_the_training_and_the_flow_run_comes_back(servers, endless):
    """A worker that is stopped kills the flow's process, and Prefect calls it Running on: the sweep does not."""
    worker = servers.processes.pop("worker")
    worker.send_signal(signal.SIGTERM)
    worker.wait(60)
    endless.goes_on("a stopped worker")
    assert servers.state(endless.id) == "RUNNING"
    servers.command("python", "-c", "from flows.recovery import sweep; sweep()")
    assert servers.flow_run(endless.id)["state_name"] == "AwaitingRetry"
    assert {t["state_type"] for t in servers.task_runs(endless.id)} <= {"COMPLETED", "CRASHED"}
    servers.launch("worker")
    endless.follows(2)


def test_cancelled_twice_it_stops_twice_with_a_checkpoint(servers, endless):
    for attempt in (1, 2):
        followed_by = endless.flow_process()
        servers.command("prefect", "flow-run", "cancel", endless.id)
        servers.wait_until(lambda n=attempt: len(endless.events("ended")) == n, f"cancellation {attempt} stops it", 30)
        end = endless.events("ended")[-1]
        assert end.data["status"] == "stopped"
        assert endless.folder.checkpoint(end.step).is_dir()
        endless.reaches("CANCELLED", 60)
        servers.wait_until(lambda: not endless.job_processes(), "the job is gone", 60)
        # Prefect takes the end of the old process for the end of a retry that comes before it.
        servers.wait_until(lambda pid=followed_by: not Path(f"/proc/{pid}").exists(), "its process has ended", 60)
        if attempt == 1:  # of which Prefect's worker reports the end once more, over a retry that comes before
            message = "Flow run was cancelled successfully."
            servers.wait_until(
                lambda m=message: servers.flow_run(endless.id)["state"]["message"] == m, "the worker knows", 60
            )
        servers.command("prefect", "flow-run", "retry", endless.id)
        servers.wait_until(lambda s=end.step: endless.steps() > s, "the retried flow run trains on")
        assert endless.events("started")[-1].step == end.step


def test_a_job_that_keeps_crashing_fails_its_flow_run_with_the_count(servers, endless):
    for _ in range(2):
        started = len(endless.events("started"))
        for pid in endless.job_processes():
            os.kill(pid, signal.SIGKILL)
        if started == 3:
            servers.wait_until(lambda n=started: len(endless.events("started")) > n, "the crashed job starts again")
            last = endless.events("started")[-1].step
            servers.wait_until(lambda s=last: endless.job_processes() and endless.steps() >= s, "it is back")
    endless.reaches("FAILED", 120)
    message = servers.flow_run(endless.id)["state"]["message"]
    assert "started again 1 times (ray.restarts=1)" in message
    assert endless.folder.job_log.name in message
