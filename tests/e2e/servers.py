"""A Prefect server, a worker and an MLflow server as processes of their own, started with their ordinary commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dapo.runtime import processes
from dapo.runtime.cluster import free_port
from dapo.runtime.telemetry import TELEMETRY_OFF

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Servers:
    """All three on free ports with everything in `home`; each can be killed and started again on its port.

    Args:
        home: an empty folder: HOME, PREFECT_HOME, databases and logs.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.mark = home, f"dapo-test-{time.time_ns()}"
        self.api, self.mlflow = f"http://127.0.0.1:{free_port()}/api", f"http://127.0.0.1:{free_port()}"
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "RAY_"))}
        self.env = ours | {
            **TELEMETRY_OFF,
            "HOME": str(home),
            "TEST_MARK": self.mark,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        (home / "prefect").mkdir()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> Servers:
        self.launch("server")
        self.launch("mlflow")
        self.wait_until(self.server_answers, "the Prefect server answers", 120)
        self.command("prefect", "work-pool", "create", "dapo", "--type", "process")
        self.command("prefect", "--no-prompt", "deploy", "--all")
        self.launch("worker")
        self.wait_until(self.mlflow_answers, "MLflow answers", 120)
        return self

    def launch(self, name: str) -> None:
        port = {"server": self.api, "mlflow": self.mlflow}.get(name, "").removesuffix("/api").rpartition(":")[2]
        listen = ("--host", "127.0.0.1", "--port", port)
        places = ("--backend-store-uri", f"sqlite:///{self.home}/mlflow.db", "--artifacts-destination")
        command = {
            "server": ("prefect", "server", "start", *listen, "--no-ui"),
            "mlflow": ("mlflow", "server", *listen, "--workers", "1", *places, f"{self.home}/artifacts"),
            "worker": ("prefect", "worker", "start", "--pool", "dapo"),
        }[name]
        with self.log(name).open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=REPOSITORY,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # Ignored in a script's background, it would be ignored by the worker too, which stops by it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def kill(self, *names: str) -> None:
        """SIGKILL; with servers everything in their session, with the worker only itself."""
        for name in names:
            process = self.processes.pop(name)
            if name == "worker":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def command(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            [str(BIN / arguments[0]), *arguments[1:]], cwd=REPOSITORY, env=self.env, capture_output=True, text=True
        )
        if check:
            assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait_until(self, what: Callable[[], Any], words: str, timeout_s: float = 180) -> Any:
        end_at = time.monotonic() + timeout_s
        while not (found := what()):
            assert time.monotonic() < end_at, f"{timeout_s} s in vain until {words}; {self.tails()}"
            time.sleep(0.3)
        return found

    def tails(self) -> str:
        logs = [self.log(name) for name in ("server", "worker", "mlflow") if self.log(name).exists()]
        return "\n".join(f"--- {p.name}\n" + "\n".join(p.read_text().splitlines()[-15:]) for p in logs)

    def close(self) -> None:
        """Everything, also what a killed worker left behind, and the local Ray."""
        assert processes.end_family(self.mark) == []

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(f"{self.api}{path}", method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, None if body is None else json.dumps(body).encode(), timeout=20) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def server_answers(self) -> bool:
        try:
            return bool(self.ask("GET", "/health"))
        except OSError:
            return False

    def mlflow_answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.mlflow}/health", timeout=5) as answer:
                return answer.read() == b"OK"
        except OSError:
            return False

    def run(self, deployment: str, overrides: Iterable[str], **parameters: Any) -> str:
        """Create a flow run, with other parameters of the flow where they are given; its id."""
        found = self.ask("GET", f"/deployments/name/{deployment}")
        given = found["parameters"] | {"overrides": list(overrides)} | parameters
        return str(self.ask("POST", f"/deployments/{found['id']}/create_flow_run", {"parameters": given})["id"])

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        return dict(self.ask("GET", f"/flow_runs/{flow_run_id}"))

    def state(self, flow_run_id: str) -> str:
        return str(self.flow_run(flow_run_id)["state_type"])

    def task_runs(self, flow_run_id: str) -> list[dict[str, Any]]:
        given = {"flow_runs": {"id": {"any_": [flow_run_id]}}, "limit": 200}
        return list(self.ask("POST", "/task_runs/filter", given))

    def artifacts(self, flow_run_id: str) -> list[dict[str, Any]]:
        return list(self.ask("POST", "/artifacts/filter", {"flow_runs": {"id": {"any_": [flow_run_id]}}, "limit": 200}))

    def events(self, name: str, run: str) -> list[dict[str, Any]]:
        """Events of this name about the run of this id."""
        about = {"event": {"name": [name]}, "resource": {"id": [f"dapo.run.{run}"]}}
        return list(self.ask("POST", "/events/filter", {"filter": about, "limit": 50})["events"])

    def logs(self, flow_run_id: str) -> list[str]:
        given = {"logs": {"flow_run_id": {"any_": [flow_run_id]}}, "limit": 200}
        return [entry["message"] for entry in self.ask("POST", "/logs/filter", given)]
