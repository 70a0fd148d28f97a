"""`dapo up`: a Prefect server, a work pool, a worker, MLflow's pages, and the deployments of prefect.yaml.

A service that answers already is used as it is. What is started here outlives the command; `runs/.up` has a record
and a log of each process, and `dapo down` ends only processes with a record there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from filelock import FileLock, Timeout

import dapo
from dapo.config.run import RunConfig
from dapo.errors import ConfigError, EnvironmentCheckError
from dapo.runtime.telemetry import TELEMETRY_OFF
from flows.daemon import Service
from flows.server import answers, configured_api

Say = Callable[[str], None]
Start = Callable[[], Callable[[], None]]
"""Starts something and returns what waits until it answers."""

DEFAULT_API = "http://127.0.0.1:4200/api"
WORKER_POLLS_S = 2
WORKER_LIMIT = 10
"""Flow runs at once. Trainings wait for each other by themselves, and say so; evaluations need not wait for them."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FILES = ("prefect.yaml", "prefect.toml", "configs")


def project_folder(say: Say) -> Path:
    """The folder with prefect.yaml: this one, else the checkout that dapo runs from, else this one, filled.

    A package that is not a checkout brings prefect.yaml, prefect.toml and configs/ with it.
    """
    here, checkout = Path.cwd(), Path(dapo.__file__).resolve().parents[1]
    if (here / "prefect.yaml").is_file():
        return here
    if (checkout / "prefect.yaml").is_file():
        say(f"no prefect.yaml here; {checkout} is used")
        return checkout
    shipped = Path(sysconfig.get_path("data")) / "share" / "dapo"
    if not (shipped / "prefect.yaml").is_file():
        raise ConfigError(f"no prefect.yaml in {here}, and none came with the package; go to the repository's folder")
    for name in _FILES:
        if (shipped / name).is_dir():
            shutil.copytree(shipped / name, here / name, dirs_exist_ok=True)
        elif not (here / name).exists():
            shutil.copy(shipped / name, here / name)
    say(f"no prefect.yaml here; {', '.join(_FILES)} of the package were written to {here}")
    return here


class Stack:
    """Server, MLflow and workers of one project folder."""

    def __init__(self, project: Path, say: Say) -> None:
        self.project, self.say = project, say
        self.runs = (project / RunConfig().run_root).resolve()  # as runs name their database
        self.state = self.runs / ".up"
        self.server = Service(self.state, "server", "Prefect server")
        self.mlflow = Service(self.state, "mlflow", "MLflow server")
        whole = yaml.safe_load((project / "prefect.yaml").read_text())
        self.deployments: list[str] = [
            f"{one['entrypoint'].partition(':')[2]}/{one['name']}" for one in whole["deployments"]
        ]
        self.pools = list(dict.fromkeys(one["work_pool"]["name"] for one in whole["deployments"]))
        self.api = self._api()

    def worker(self, pool: str) -> Service:
        return Service(self.state, f"worker-{pool}", f"worker of pool {pool}")

    @property
    def worker_name(self) -> str:
        """Constant per folder and machine, so that a killed worker is recognised as ours.

        The host, then a colon: `flows.recovery` reads from it on which machine a flow run was started.
        """
        return f"{socket.gethostname()}:{self.project.name}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One `up` or `down` at a time."""
        self.state.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.state / "lock")
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            self.say(f"another `dapo up` or `dapo down` works in {self.project}; waiting for it")
            held = lock.acquire()
        with held:
            yield

    def up(self, mlflow_port: int) -> None:
        """Start what does not answer, register all deployments."""
        with self.locked():
            # Both are looked up before either is started, and both start at the same time.
            starts = [start for start in (self._find_server(), self._find_mlflow(mlflow_port)) if start]
            for wait in [start() for start in starts]:
                wait()
            self.talk_to_server()
            self._make_pools()
            self._deploy()
            for pool in self.pools:
                self._start_worker(pool)

    def _api(self) -> str:
        """PREFECT_API_URL of the shell, else the server started here, else what `prefect` uses in this folder."""
        if url := os.environ.get("PREFECT_API_URL"):
            return url.rstrip("/")
        for service in (self.server, *map(self.worker, self.pools)):
            if record := service.running():
                return record.address
        before = Path.cwd()
        os.chdir(self.project)  # prefect.toml is looked for in the working directory
        try:
            return (configured_api() or DEFAULT_API).rstrip("/")
        finally:
            os.chdir(before)

    def _find_server(self) -> Start | None:
        """The service to start; None where a server answers."""
        ui = self.api.removesuffix("/api")
        if answers(self.api):
            ours = self.server.running()
            self.say(f"Prefect    {ui}  {'runs already' if ours else 'found, not ours'}")
            return None
        url = urlsplit(self.api)
        port = url.port or 4200
        if url.hostname not in _LOOPBACK or url.scheme != "http":
            raise EnvironmentCheckError(
                f"no Prefect server answers at {self.api} (PREFECT_API_URL, prefect.toml or the profile says so), and "
                f"one can be started on this machine only; start that one, or: PREFECT_API_URL={DEFAULT_API} dapo up"
            )
        self.server.stop()  # one that runs but does not answer
        _require_free(port, "the Prefect server", f"PREFECT_API_URL=http://127.0.0.1:{port + 1}/api dapo up")
        host = "127.0.0.1" if url.hostname == "localhost" else str(url.hostname)
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]

        def start() -> Callable[[], None]:
            begun = time.monotonic()
            self.server.start(command, self.api, self._env(), self.project)

            def wait() -> None:
                self.server.wait(lambda: answers(self.api))
                self.say(f"Prefect    {ui}  started in {time.monotonic() - begun:.0f} s, log {self.server.log}")

            return wait

        return start

    def talk_to_server(self) -> None:
        """Call before anything of Prefect is imported: its settings are read then."""
        os.environ.update(TELEMETRY_OFF)
        os.environ["PREFECT_API_URL"] = self.api

    def _make_pools(self) -> None:
        from flows.pool import make_pool
        from flows.recovery import sweep

        for pool in self.pools:
            self.say(f"work pool  {pool}  {'created' if make_pool(pool) else 'found'}")
        for name in sweep():
            self.say(f"           flow run {name} had lost its process; it is scheduled again and follows its training")

    def _deploy(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=self.project,
            env=self._env(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last_lines = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise EnvironmentCheckError(f"`prefect deploy --all` in {self.project} failed:\n{last_lines}")
        self.say(f"deployed   {', '.join(self.deployments)}")

    def _start_worker(self, pool: str) -> None:
        from flows.pool import online_workers, pool_type

        service = self.worker(pool)
        ours = service.running()
        if ours and ours.address == self.api and self.worker_name in online_workers(pool):
            self.say(f"worker     {self.worker_name}  runs already")
            return
        if others := [name for name in online_workers(pool) if name != self.worker_name]:
            self.say(f"worker     {', '.join(others)}  found, not ours")
            return
        if (kind := pool_type(pool)) != "process":
            self.say(f"worker     none: pool {pool} is of type {kind}, start a worker of that type for it")
            return
        service.stop()
        # A worker killed a moment ago still counts as online: only a later word is the new one's.
        before = online_workers(pool).get(self.worker_name)
        settings = {"PREFECT_WORKER_QUERY_SECONDS": str(WORKER_POLLS_S)}
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
        command += ["--name", self.worker_name, "--limit", str(WORKER_LIMIT)]
        service.start(command, self.api, self._env() | settings, self.project)

        def heard() -> bool:
            return online_workers(pool).get(self.worker_name, before) != before

        service.wait(heard)
        self.say(f"worker     {self.worker_name}  started, log {service.log}")

    def _find_mlflow(self, port: int) -> Start | None:
        """The MLflow service to start, over the default store of our runs; None where a server answers."""
        given = os.environ.get("MLFLOW_TRACKING_URI", "")
        url = urlsplit(given)
        if given and (url.scheme not in ("http", "https") or _healthy(given)):
            ours = self.mlflow.running()
            whose = "runs already" if ours and ours.address == given.rstrip("/") else "found, not ours"
            self.say(f"MLflow     {given}  {whose}")
            return None
        if given and (url.hostname not in _LOOPBACK or url.scheme != "http"):
            raise EnvironmentCheckError(
                f"no MLflow answers at MLFLOW_TRACKING_URI={given}; start it, or unset the variable for one of our own"
            )
        if (ours := self.mlflow.running()) and _healthy(ours.address):
            self.say(f"MLflow     {ours.address}  runs already")
            return None
        self.mlflow.stop()
        port = url.port or port
        _require_free(port, "the MLflow server", f"dapo up --mlflow-port {port + 1}")
        address = f"http://127.0.0.1:{port}"
        store = f"sqlite:///{self.runs / 'mlflow.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--backend-store-uri", store, "--workers", "1"]
        # Artifacts lie where runs that write to the database themselves put them, and are read from there by everybody.
        command += ["--default-artifact-root", str(self.runs / "mlartifacts"), "--no-serve-artifacts"]
        # Consumers of jobs that nothing here uses would take 2 GB.
        env = self._env() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

        def start() -> Callable[[], None]:
            begun = time.monotonic()
            self.mlflow.start(command, address, env, self.project)

            def wait() -> None:
                self.mlflow.wait(lambda: _healthy(address))
                self.say(f"MLflow     {address}  started in {time.monotonic() - begun:.0f} s, log {self.mlflow.log}")

            return wait

        return start

    def _env(self) -> dict[str, str]:
        """Environment of everything started here: this Python first in PATH, this server, no telemetry."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **TELEMETRY_OFF, "PATH": path, "PREFECT_API_URL": self.api}


def _healthy(address: str) -> bool:
    """Whether an MLflow server answers: other programs have no /health, or return more than OK."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=5.0) as answer:
            return answer.status == 200 and answer.read().strip() == b"OK"
    except (OSError, ValueError):
        return False


def _require_free(port: int, what: str, instead: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise EnvironmentCheckError(
                f"port {port} is taken by another program (`ss -ltnp 'sport = :{port}'` shows which), and {what} is "
                f"to listen there; end it, or take another port: {instead}"
            ) from None
