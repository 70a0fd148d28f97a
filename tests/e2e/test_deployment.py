"""From nothing to a deployment run and back: `dapo up`, `prefect deployment run`, `dapo up` again, `dapo down`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest

from dapo.config import io
from dapo.observe.journal import read
from dapo.observe.run_folder import RunFolder
from dapo.runtime import processes
from dapo.runtime.cluster import free_port
from tests.e2e.pipeline import REPOSITORY, SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
CONFIG = "configs/geo3k_tiny.yaml"


class Machine:
    """A home and a project folder of its own; everything started from here carries its mark."""

    def __init__(self, root: Path) -> None:
        self.project, self.mark = root / "project", f"dapo-test-{time.time_ns()}"
        for folder in (self.project, root / "home"):
            folder.mkdir()
        for name in ("prefect.yaml", "prefect.toml", "configs"):
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, self.project / name)
        self.api, self.mlflow_port = f"http://127.0.0.1:{free_port()}/api", free_port()
        settings = self.project / "prefect.toml"
        settings.write_text(settings.read_text().replace("http://127.0.0.1:4200/api", self.api))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "RAY_"))}
        self.env = {**clean, "HOME": str(root / "home"), "PYTHONPATH": str(REPOSITORY), "TEST_MARK": self.mark}

    def run(self, *command: str, code: int = 0, timeout_s: float = 600) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.project,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def up(self) -> str:
        return self.run("dapo.cli", "up", "--mlflow-port", str(self.mlflow_port))

    def deployment_run(self, deployment: str, *arguments: str, code: int = 0, **overrides: object) -> str:
        """Returns the flow run's id."""
        parameters = ["-p", f"overrides={json.dumps(overrides)}"] if overrides else []
        output = self.run("prefect", "deployment", "run", deployment, *parameters, *arguments, code=code)
        return re.search(r"UUID: (\S+)", output)[1]

    def ask(self, path: str, body: dict | None = None) -> object:
        import urllib.request

        request = urllib.request.Request(f"{self.api}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def state(self, flow_run_id: str) -> dict:
        return self.ask(f"/flow_runs/{flow_run_id}")["state"]

    def service(self, name: str) -> dict:
        return json.loads((self.project / "runs" / ".up" / f"{name}.json").read_text())

    def folder(self, **overrides: object) -> RunFolder:
        before = Path.cwd()
        os.chdir(self.project)
        try:
            return RunFolder.of(io.load(CONFIG, overrides))
        finally:
            os.chdir(before)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("deployment"))
    yield machine
    # Whatever a failed test left; after a good one there is nothing.
    processes.end_family(machine.mark)


def dotted(*pairs: str) -> dict[str, object]:
    return {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def wait_for(what, within_s: float, why: str) -> None:
    end_at = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end_at, f"not within {within_s:.0f} s: {why}"
        time.sleep(0.3)


def test_from_nothing_to_a_deployment_run_and_back(machine):
    output = machine.up()
    assert f"export PREFECT_API_URL={machine.api}" in output
    assert f"http://127.0.0.1:{machine.mlflow_port}" in output
    assert "dapo/geo3k-tiny" in output
    before = {name: machine.service(name)["pid"] for name in ("server", "mlflow", "worker-dapo")}

    # On a machine without NPUs the recipe is refused in its first task.
    refused = machine.deployment_run("dapo/geo3k", "--watch", code=1)
    assert machine.state(refused)["type"] == "FAILED"
    assert "this machine has: CPU" in machine.state(refused)["message"]
    assert [t["name"] for t in tasks(machine, refused)] == ["validate_environment-machine"]

    small = dotted(*SMALL, "model.parallel.world_size=1")
    trained = machine.deployment_run("dapo/geo3k-tiny", "--watch", **small)
    state = machine.state(trained)
    assert state["type"] == "COMPLETED", state

    # Every validation and checkpoint once, in Prefect and in MLflow's server.
    names = sorted(t["name"] for t in tasks(machine, trained))
    for kind, steps in (("record_validation", (0, 1, 2)), ("log_checkpoint", (1, 2))):
        assert [n for n in names if n.startswith(kind)] == [f"{kind}-step-{step}" for step in steps]
    assert all(t["state_type"] == "COMPLETED" for t in tasks(machine, trained))
    folder = machine.folder(**small)
    artifacts = machine.ask("/artifacts/filter", {"flow_runs": {"id": {"any_": [trained]}}})
    keys = {a["key"] for a in artifacts}
    one = folder.id.lower().replace(".", "-")
    assert {"train", f"validation-{one}", f"checkpoint-{one}", f"summary-{one}", "environment-machine"} <= keys
    client = mlflow.MlflowClient(f"http://127.0.0.1:{machine.mlflow_port}")
    [run] = client.search_runs([client.get_experiment_by_name("dapo").experiment_id])
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/accuracy")] == [0, 1, 2]
    assert "report.html" in {a.path for a in client.list_artifacts(run.info.run_id)}

    # Prefect's pages lead to the run in the MLflow that `dapo up` started; no run's configuration names it.
    page = f"http://127.0.0.1:{machine.mlflow_port}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    described = [a["description"] for a in artifacts if a["key"] in (f"validation-{one}", f"checkpoint-{one}")]
    assert len(described) == 5
    assert all(f"[MLflow]({page})" in words for words in described)
    [summary] = [a["data"] for a in artifacts if a["key"] == f"summary-{one}"]
    assert page in summary

    # Run twice, nothing is started twice; what was killed is started again.
    again = machine.up()
    assert again.count("runs already") == 3
    assert {name: machine.service(name)["pid"] for name in before} == before
    os.kill(before["worker-dapo"], signal.SIGKILL)
    assert machine.up().count("runs already") == 2
    assert machine.service("worker-dapo")["pid"] != before["worker-dapo"]

    # A training goes on without the worker, and stops with a checkpoint when that is asked for.
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"], env=machine.env)
    long = small | {"train.steps": 5000, "train.test_freq": 0, "train.save_freq": 0, "seed": 1}
    machine.deployment_run("dapo/geo3k-tiny", **long)
    journal = machine.folder(**long).journal

    def steps():
        return [e.step for e in read(journal) if e.kind == "step"]

    wait_for(steps, 300, "the long run's first step")
    output = machine.run("dapo.cli", "down")
    assert "goes on" in output
    reached = steps()[-1]
    wait_for(lambda: steps()[-1] > reached, 120, "steps without worker and server")
    output = machine.run("dapo.cli", "down", "--stop-runs")
    assert "asked to save a checkpoint" in output
    last = list(read(journal))[-1]
    assert (last.kind, last.data["status"]) == ("ended", "stopped")
    assert [e.step for e in read(journal) if e.kind == "checkpoint"] == [last.step]

    left = [p for p in processes.family(machine.mark) if p.pid != stranger.pid]
    assert left == [], [Path(f"/proc/{p.pid}/cmdline").read_bytes() for p in left]
    assert stranger.poll() is None, "a process of somebody else's is spared"
    stranger.kill()
    stranger.wait()


def tasks(machine: Machine, flow_run_id: str) -> list[dict]:
    return machine.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run_id]}}})
