"""Where the training job runs: a cluster at an address, or a Ray head on this machine that we start and can end.

The local head is detached from whoever started it: training goes on when the flow, its worker or the terminal dies, and
the next flow finds it by the state file in `run_root`. It listens on loopback only and requires a token of its own.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from dapo.config.run import RunConfig
from dapo.errors import EnvironmentCheckError
from dapo.observe.run_folder import run_id
from dapo.runtime import processes
from dapo.runtime.dashboard import Dashboard, DashboardAway
from dapo.runtime.head import LiveJob, LocalHead, answering, forget, jobs, locked, remember, remembered
from dapo.runtime.telemetry import TELEMETRY_OFF

START_DEADLINE_S = 120.0
_OBJECT_STORE_BYTES = 200_000_000  # weights do not pass through it on one machine; Ray's default takes 30 % of memory
_MARK = "DAPO_RAY_HEAD"
_BUSY_S = 60.0

log = logging.getLogger(__name__)


_user: int | None = None


def use_while_running() -> None:
    """From now on this process is a user of the local heads it connects to: the last user to leave ends the head.

    Without it a head started here stays, so that training survives the flow's process.
    """
    global _user
    _user = os.getpid()


def connect(config: RunConfig) -> Dashboard:
    """The configured cluster, or the local head of `run_root`, started where none runs.

    Args:
        config: `ray.address`, `ray.token_env`, `ray.preload`, `run_root`.

    Raises:
        EnvironmentCheckError: nothing, or no Ray, answers at `ray.address`; the local head does not start, or does not
            answer while a job runs on it.
    """
    if config.ray.address:
        remote = Dashboard(config.ray.address.rstrip("/"), os.environ.get(config.ray.token_env))
        try:
            remote.version()
        except DashboardAway as away:
            raise EnvironmentCheckError(
                f"ray.address={config.ray.address}: {away}. Start the cluster (`ray start --head "
                "--dashboard-host=0.0.0.0` on its first node) or set ray.address to null for a Ray on this machine"
            ) from None
        return remote
    place = state_folder(config)
    with locked(place):
        head = remembered(place)
        if head is not None:
            running = _patiently(place, head)
            if running is not None:
                if head.users and _user:
                    remember(place, replace(head, users=_living(head, _user)))
                return running
            _end(place, head)
        # A head that died is started again for the same users.
        users = _living(head, _user) if head is not None and head.users else ()
        return _start(place, config, users or ((_user,) if _user else ()))


def find_local(config: RunConfig) -> Dashboard | None:
    """The local head of `run_root` where one runs."""
    place = state_folder(config)
    head = remembered(place)
    return None if head is None else answering(place, head)


def local_pids(config: RunConfig) -> list[int]:
    """Processes of the local head of `run_root` and everything it runs."""
    head = remembered(state_folder(config))
    return [] if head is None else [process.pid for process in processes.family(head.mark)]


def local_jobs(config: RunConfig) -> list[LiveJob]:
    """What runs on the local head of `run_root`, whether it answers or not."""
    place = state_folder(config)
    head = remembered(place)
    return [] if head is None else jobs(place, head)


def leave(config: RunConfig) -> list[processes.Process]:
    """End the local head where this process was its last living user, and everything it runs, the job too.

    Returns:
        Processes that could not be ended (none, unless another user owns them).
    """
    place = state_folder(config)
    if not place.is_dir():
        return []
    with locked(place):
        head = remembered(place)
        if head is None or _user not in head.users:
            return []
        others = tuple(pid for pid in _living(head, None) if pid != _user)
        # Somebody else's job stays: one that a worker's flow began, for example.
        if others or any(job.run.id != run_id(config) for job in jobs(place, head)):
            remember(place, replace(head, users=others))
            return []
        return _end(place, head)


def end_unused(config: RunConfig) -> str:
    """End the local head of `run_root` unless a living process or a job uses it; says which, or nothing."""
    place = state_folder(config)
    if not place.is_dir():
        return ""
    with locked(place):
        head = remembered(place)
        if head is None:
            return ""
        users = [f"process {pid}" for pid in _living(head, None)]
        users += [f"{job.kind} {job.run.id}" for job in jobs(place, head)]
        if not users:
            _end(place, head)
        return ", ".join(users)


def stop_local(config: RunConfig) -> list[processes.Process]:
    """End the local head of `run_root` whoever uses it; returns what could not be ended."""
    place = state_folder(config)
    if not place.is_dir():
        return []
    with locked(place):
        head = remembered(place)
        return [] if head is None else _end(place, head)


def state_folder(config: RunConfig) -> Path:
    """Folder of the local head's record."""
    return Path(config.run_root).resolve() / ".ray"


def free_port() -> int:
    """A loopback port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(place: Path, config: RunConfig, users: tuple[int, ...]) -> Dashboard:
    token = place / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    # Ray puts sockets there, whose whole path may have 107 characters: too short for a run folder deep in a home.
    temp_dir = tempfile.mkdtemp(prefix="dapo-ray-")
    port, client_port = free_port(), free_port()
    head = LocalHead(f"http://127.0.0.1:{port}", secrets.token_hex(8), temp_dir, users)
    remember(place, head)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"),
        *("--port=0", f"--ray-client-server-port={client_port}", "--dashboard-agent-listen-port=0"),
        *("--min-worker-port=0", "--max-worker-port=0"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
        *("--no-monitor", "--include-log-monitor=false"),
        f"--num-cpus={os.cpu_count() or 1}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--temp-dir={temp_dir}",
    ]
    env = _clean(os.environ) | TELEMETRY_OFF | dict(config.ray.preload)
    env |= {
        _MARK: head.mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Its name says only half: without it Ray listens on the machine's outer address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Nothing here uses workers without an environment of their own: one per core would be started for nothing.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        # A job asked to stop writes a checkpoint first.
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
    }
    log = place / "head.log"
    with log.open("w") as output:
        started = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    dashboard = _wait(started, place, head, log)
    if dashboard is None:
        _end(place, head)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise EnvironmentCheckError(
            f"Ray did not start on this machine within {START_DEADLINE_S:.0f} s; see {log}. Its last log lines:\n{tail}"
        )
    return dashboard


def _wait(started: subprocess.Popen[bytes], place: Path, head: LocalHead, log: Path) -> Dashboard | None:
    end_at = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < end_at:
        if started.poll() not in (None, 0):
            return None
        # The command returns when the head runs; its jobs interface may need a moment more.
        if started.poll() == 0 and (dashboard := answering(place, head)):
            return dashboard
        time.sleep(0.1)
    started.kill()
    started.wait()
    return None


def _patiently(place: Path, head: LocalHead) -> Dashboard | None:
    """A busy machine may take long to answer; only a head without processes is gone, and its job with it.

    Raises:
        EnvironmentCheckError: it does not answer, and a job runs on it, which would end with it.
    """
    end_at = time.monotonic() + _BUSY_S
    while True:
        dashboard = answering(place, head)
        if dashboard is not None:
            return dashboard
        if not processes.family(head.mark):
            return None
        if time.monotonic() > end_at:
            if running := jobs(place, head):
                raise EnvironmentCheckError(
                    f"the local Ray at {head.address} has not answered for {_BUSY_S:.0f} s, but "
                    f"{', '.join(f'{job.kind} {job.run.id}' for job in running)} runs on it: nothing was ended. Try "
                    "again later, or stop it with a checkpoint: `dapo down --stop-runs`"
                )
            return None
        log.warning("the local Ray at %s runs but does not answer yet", head.address)
        time.sleep(1.0)


def _end(place: Path, head: LocalHead) -> list[processes.Process]:
    left = processes.end_family(head.mark, grace_s=2.0)
    shutil.rmtree(head.temp_dir, ignore_errors=True)
    forget(place)
    return left


def _living(head: LocalHead, besides: int | None) -> tuple[int, ...]:
    users = {*head.users, *([besides] if besides else [])}
    return tuple(sorted(pid for pid in users if processes.look(pid)))


def _clean(env: os._Environ[str]) -> dict[str, str]:
    """Our environment without variables that point Ray at another cluster."""
    other = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    return {k: v for k, v in env.items() if k not in other}
