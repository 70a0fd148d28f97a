"""Ray's dashboard by its documented REST interface, with a time limit on every call (Ray's own client has none)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from dapo.errors import EnvironmentCheckError

TERMINAL = ("STOPPED", "SUCCEEDED", "FAILED")


class DashboardAway(OSError):
    """The dashboard does not answer now. Training does not need it: ask again later."""


class UnknownJob(KeyError):
    """The cluster has no job of this submission id."""


class AlreadySubmitted(Exception):
    """The cluster has a job of this submission id."""


@dataclass(frozen=True, slots=True, repr=False)
class Dashboard:
    """Client of one cluster's job interface.

    Args:
        address: http://host:port.
        token: bearer token where the cluster asks for one. Never logged.
        local: the cluster runs on this machine and sees its files; nothing has to be uploaded.
    """

    address: str
    token: str | None = None
    local: bool = False

    def __repr__(self) -> str:
        return f"Dashboard({self.address})"

    def version(self) -> str:
        """Ray's version.

        Raises:
            EnvironmentCheckError: what answers is not a Ray dashboard, or refuses the token.
            DashboardAway: nothing answers.
        """
        answer = self._ask("GET", "/api/version")
        if not isinstance(answer, dict) or "ray_version" not in answer:
            raise EnvironmentCheckError(self._not_ray())
        return str(answer["ray_version"])

    def job(self, submission_id: str) -> dict[str, Any]:
        """`status`, `message`, `driver_exit_code`, ... of a job; raises UnknownJob."""
        return dict(self._ask("GET", f"/api/jobs/{quote(submission_id)}"))

    def jobs(self) -> list[dict[str, Any]]:
        """All submitted jobs the cluster remembers."""
        return [job for job in self._ask("GET", "/api/jobs/") if job.get("submission_id")]

    def submit(self, submission_id: str, entrypoint: str, env: dict[str, str], metadata: dict[str, str]) -> None:
        """Start a shell command on the head node.

        Raises:
            AlreadySubmitted: the cluster has a job of this id.
        """
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "runtime_env": {"env_vars": env},
            "metadata": metadata,
        }
        self._ask("POST", "/api/jobs/", body, limit_s=60.0)

    def stop(self, submission_id: str) -> None:
        """SIGTERM to the job's processes, later SIGKILL; returns at once."""
        self._ask("POST", f"/api/jobs/{quote(submission_id)}/stop", {})

    def log(self, submission_id: str) -> str:
        """Everything the job and its workers printed."""
        return str(self._ask("GET", f"/api/jobs/{quote(submission_id)}/logs", limit_s=60.0)["logs"])

    def nodes(self) -> list[dict[str, Any]]:
        """Living nodes with their `resources_total` (CPU, GPU, NPU, memory)."""
        rows = self._ask("GET", "/api/v0/nodes?detail=true")["data"]["result"]["result"]
        return [row for row in rows if row["state"] == "ALIVE"]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, limit_s: float = 10.0) -> Any:
        request = urllib.request.Request(self.address.rstrip("/") + path, method=method)
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with _direct(self.address).open(request, timeout=limit_s) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code in (401, 403):
                raise EnvironmentCheckError(
                    f"Ray at {self.address} refuses us (HTTP {error.code}): put the cluster's token "
                    "(`ray get-auth-token` on the head node) into the variable named by ray.token_env"
                ) from None
            if error.code == 404 and path.startswith("/api/jobs/") and "does not exist" in text:
                raise UnknownJob(path.split("/")[3]) from None
            if "already exists" in text:
                raise AlreadySubmitted(text.strip()[-300:]) from None
            if error.code == 404:
                raise EnvironmentCheckError(self._not_ray()) from None
            raise DashboardAway(f"Ray at {self.address}: HTTP {error.code}: {text.strip()[-300:]}") from None
        except ValueError:
            raise EnvironmentCheckError(self._not_ray()) from None
        except OSError as error:
            raise DashboardAway(f"Ray at {self.address} does not answer: {error}") from None

    def _not_ray(self) -> str:
        return (
            f"what answers at {self.address} is not a Ray dashboard (the port is taken by another program); "
            "set ray.address to the cluster's dashboard, usually http://HEAD:8265, or to null for a Ray on this machine"
        )


def _direct(address: str) -> urllib.request.OpenerDirector:
    """Loopback is never behind a proxy, whatever the environment says."""
    host = urlsplit(address).hostname
    handlers = [urllib.request.ProxyHandler({})] if host in ("127.0.0.1", "localhost", "::1") else []
    return urllib.request.build_opener(*handlers)
