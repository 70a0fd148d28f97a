"""The Prefect server a run here uses: the configured one where it answers, else a temporary one that ends with us."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dapo.errors import EnvironmentCheckError
from dapo.runtime.cluster import free_port
from dapo.runtime.leash import LeashedProcess
from dapo.runtime.telemetry import TELEMETRY_OFF

START_DEADLINE_S = 120.0
# What `prefect` itself gives its temporary servers, and a memory of what it registered, so that it starts faster again.
_EPHEMERAL = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}


def configured_api() -> str | None:
    """The API that `prefect` commands here would use: environment, prefect.toml, profile; without importing Prefect."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError):
        if url := tomllib.loads(Path("prefect.toml").read_text()).get("api", {}).get("url"):
            return str(url)
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError):
        profiles = tomllib.loads((home / "profiles.toml").read_text())
        active = os.environ.get("PREFECT_PROFILE", profiles.get("active", ""))
        if url := profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL"):
            return str(url)
    return None


def answers(api: str | None) -> bool:
    """Whether a healthy Prefect server is there."""
    if not api:
        return False
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/health", timeout=2.0) as answer:
            return answer.status == 200 and json.loads(answer.read()) is True
    except (OSError, ValueError):
        return False


class TemporaryServer:
    """A server of our own on a free loopback port, with its database in `home`; begins to start at once. The
    environment is changed so that a Prefect imported later uses it.

    Args:
        home: becomes PREFECT_HOME; where another run uses it now, a folder for this run only is used instead.
    """

    why = "temporary server (none is configured)"

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(home / "lock", thread_local=False)
        self._own_home: str | None = None
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            # Two servers on one SQLite file lock each other out.
            self._own_home = tempfile.mkdtemp(prefix="prefect-", dir=home.parent)
            home = Path(self._own_home)
        port = free_port()
        self.api, self.log = f"http://127.0.0.1:{port}/api", home / "server.log"
        os.environ.update(
            {
                **TELEMETRY_OFF,
                "PREFECT_HOME": str(home),
                "PREFECT_API_URL": self.api,
                "PREFECT_LOCAL_STORAGE_PATH": str(home.parent / ".results"),
                "PREFECT_MEMO_STORE_PATH": str(home / "memo_store.toml"),
                "PREFECT_LOGGING_TO_API_ENABLED": "false",
            }
        )
        self.log.unlink(missing_ok=True)
        app = ("--factory", "prefect.server.api.server:create_app", "--lifespan", "on", "--log-level", "error")
        place = ("--host", "127.0.0.1", "--port", str(port))
        env = {**os.environ, **_EPHEMERAL}
        self._process = LeashedProcess("dapo.runtime.leash", "uvicorn", *app, *place, env=env, log=self.log)

    def wait(self) -> None:
        """Return once it answers."""
        end_at = time.monotonic() + START_DEADLINE_S
        while not answers(self.api):
            if self._process.poll() is not None or time.monotonic() > end_at:
                raise EnvironmentCheckError(
                    f"the temporary Prefect server did not start within {START_DEADLINE_S:.0f} s; see {self.log}. "
                    f"Its last log lines:\n{self._process.last_lines()}"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        self._process.stop()
        self._lock.release()
        if self._own_home:
            shutil.rmtree(self._own_home, ignore_errors=True)


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[TemporaryServer | None]:
    """The temporary server, still starting (call its `wait`), or None where the configured one answers."""
    configured = configured_api()
    if answers(configured):
        os.environ.update(TELEMETRY_OFF)
        yield None
        return
    server = TemporaryServer(home)
    if configured:
        server.why = f"temporary server (no Prefect server answers at the configured {configured})"
    try:
        yield server
    finally:
        server.stop()
