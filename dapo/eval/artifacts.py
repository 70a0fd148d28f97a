"""Files of a run in MLflow: on this machine, in object storage, or where only the server sees them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class Artifacts:
    """Small text files of one run.

    A run that wrote to the database itself has a path of its machine as its artifacts' address, which MLflow's client
    would look up on this one. The server that is asked sees them (its pages show them), so they are had from there.

    Args:
        client: of the store.
        run: whose.
    """

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self._client, self._run_id = client, str(run.info.run_id)
        remote = urlsplit(client.tracking_uri).scheme in ("http", "https")
        self._ask_server = remote and urlsplit(str(run.info.artifact_uri)).scheme in ("", "file")

    def paths(self, folder: str = "") -> list[str]:
        """What lies in a folder; empty where it does not exist."""
        if not self._ask_server:
            return [str(found.path) for found in self._client.list_artifacts(self._run_id, folder)]
        answer = self._get("/api/2.0/mlflow/artifacts/list", path=folder).json()
        return [str(found["path"]) for found in answer.get("files", ())]

    def text(self, path: str) -> str | None:
        """A file's content; None where it does not exist."""
        if path not in self.paths(path.rpartition("/")[0]):
            return None
        if self._ask_server:
            return str(self._get("/get-artifact", path=path).content.decode())
        with tempfile.TemporaryDirectory() as place:
            return Path(self._client.download_artifacts(self._run_id, path, place)).read_text()

    def _get(self, endpoint: str, path: str) -> Any:
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request, verify_rest_response

        asked = {"run_id": self._run_id} | ({"path": path} if path else {})
        answer = http_request(get_default_host_creds(self._client.tracking_uri), endpoint, "GET", params=asked)
        return verify_rest_response(answer, endpoint)
