"""Models by reference: MLflow's registry knows where a checkpoint lies and what it is, never its gigabytes.

Aliases: `challenger` is the latest candidate, `champion` the model in use, `previous-champion` the one before it.
Moving an alias is one write to MLflow: readers get the old champion or the new one, never none. After a rollback
`champion` and `previous-champion` are the same version: there is nothing left to go back to.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from dapo.errors import ConfigError, EnvironmentCheckError, WeightsError
from dapo.observe.shipper import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous-champion"
LOADER = """\
import mlflow
from transformers import AutoModelForImageTextToText, AutoProcessor

version = mlflow.MlflowClient("{tracking_uri}").get_model_version("{name}", "{version}")
folder = version.tags["checkpoint.uri"].removeprefix("file://")
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
"""


class ChampionChanged(ConfigError):
    """A promotion over a champion that is not the champion any more; nothing was changed."""


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One registered model."""

    name: str
    version: int
    tags: Mapping[str, str]
    """checkpoint.uri, checkpoint.digest, checkpoint.step, data.key, code.commit, ... (docs/lifecycle.md)."""
    run_id: str
    """MLflow run that trained it; empty where none did."""
    model_id: str
    """MLflow's logged model behind it."""

    @property
    def reference(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def folder(self) -> Path:
        """The Hugging Face folder on this machine.

        Raises:
            WeightsError: the checkpoint is not on a file system, or not on this machine's.
        """
        uri = self.tags["checkpoint.uri"]
        parts = urlsplit(uri)
        path = Path(unquote(parts.path))
        if parts.scheme != "file" or not (path / "config.json").is_file():
            raise WeightsError(
                f"{self.reference} lies at {uri}, which is not a model folder this machine sees; run where it is "
                "mounted, or copy it and evaluate the copy's folder"
            )
        return path


class Registry:
    """One registered model name in one MLflow store.

    Args:
        uri: tracking and registry URI.
        name: of the registered model.
    """

    def __init__(self, uri: str, name: str) -> None:
        self.uri, self.name = uri, name
        self.client: MlflowClient = connect(uri)

    def get(self, which: str | int) -> ModelVersion | None:
        """The version with this number or alias; None where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            if isinstance(which, int) or which.isdigit():
                return self._of(self.client.get_model_version(self.name, str(which)))
            # The alias of a missing name and a missing alias are different errors in MLflow.
            return self._of(self.client.get_model_version_by_alias(self.name, which))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def require(self, which: str | int) -> ModelVersion:
        """Like `get`; raises ConfigError where there is none."""
        if (found := self.get(which)) is not None:
            return found
        there = ", ".join(f"{v.version}" for v in self.versions()) or "none"
        aliases = ", ".join(f"{a} = {v}" for a, v in self.aliases().items()) or "none"
        raise ConfigError(
            f"{self.name} has no {which!r} in the registry at {self.uri}; versions: {there}; aliases: {aliases}"
        )

    def versions(self) -> list[ModelVersion]:
        """All versions, oldest first."""
        found = self.client.search_model_versions(f"name = '{self.name}'", max_results=1000)
        return sorted((self._of(v) for v in found), key=lambda v: v.version)

    def aliases(self) -> dict[str, int]:
        """Alias to version."""
        from mlflow.exceptions import MlflowException

        try:
            return {a: int(v) for a, v in self.client.get_registered_model(self.name).aliases.items()}
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise

    def register(self, model_id: str, run_id: str, tags: Mapping[str, str], card: str) -> ModelVersion:
        """A new version for a logged model, or the one that has its weights already (same `checkpoint.digest`).

        Args:
            model_id: of the logged model (`logged_model` below).
            run_id: MLflow run that trained it, or empty.
            tags: must have checkpoint.uri and checkpoint.digest.
            card: Markdown, shown by MLflow.
        """
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for known in self.versions():
            if known.tags.get("checkpoint.digest") == tags["checkpoint.digest"]:
                return known
        made = self.client.create_model_version(
            self.name,
            source=f"models:/{model_id}",
            run_id=run_id or None,
            tags=dict(tags),
            description=card,
            model_id=model_id,  # a server refuses the source without it
        )
        snippet = LOADER.format(tracking_uri=self.uri, name=self.name, version=made.version)
        self.client.set_model_version_tag(self.name, str(made.version), "loader", snippet)
        return self.require(int(made.version))

    def challenge(self, version: ModelVersion) -> None:
        """Give it the alias `challenger`."""
        self.client.set_registered_model_alias(self.name, CHALLENGER, str(version.version))

    def promote(self, version: ModelVersion, over: ModelVersion | None) -> None:
        """Make it the champion; the old one becomes `previous-champion`. Safe to repeat.

        Args:
            over: the champion it was compared with.

        Raises:
            ChampionChanged: another version became champion meanwhile; nothing was changed.
        """
        now = self.get(CHAMPION)
        if now is not None and now.version == version.version:
            return
        if (now.version if now else None) != (over.version if over else None):
            raise ChampionChanged(
                f"{self.name}: version {version.version} was compared with "
                f"{f'version {over.version}' if over else 'no champion'}, but the champion is now "
                f"{f'version {now.version}' if now else 'none'}; evaluate against that one"
            )
        # This order: whatever happens in between, there is a champion, and the way back is known.
        if now is not None:
            self.client.set_registered_model_alias(self.name, PREVIOUS, str(now.version))
        self.client.set_registered_model_alias(self.name, CHAMPION, str(version.version))

    def rollback(self, reason: str = "") -> tuple[ModelVersion, ModelVersion]:
        """The previous champion is the champion again; the other version keeps tags of it, `rollback.at by reason to`.

        Returns:
            The champion until now, and the champion from now on.

        Raises:
            ConfigError: there is no previous champion, or it is the champion again already.
        """
        now, before = self.require(CHAMPION), self.get(PREVIOUS)
        if before is None or before.version == now.version:
            raise ConfigError(self._nothing_before(now))
        record = {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "by": _operator(), "reason": reason}
        # First the record, for the alias is the one write that counts: killed before it, the same command is repeated.
        self.tag(now, {f"rollback.{key}": value for key, value in (record | {"to": str(before.version)}).items()})
        self.client.set_registered_model_alias(self.name, CHAMPION, str(before.version))
        return now, before

    def _nothing_before(self, now: ModelVersion) -> str:
        """Why there is no way back; after a rollback the way forward is one that has to be asked for."""
        taken_back = [v for v in self.versions() if v.tags.get("rollback.to") == str(now.version)]
        if not taken_back:
            return f"{self.name}: version {now.version} is the champion and no other was before it"
        last = max(taken_back, key=lambda v: v.tags["rollback.at"])
        return (
            f"{self.name}: version {now.version} is the champion again since {last.tags['rollback.at']}, when "
            f"{last.tags['rollback.by']} took version {last.version} back; a second rollback would bring version "
            f"{last.version} back as champion. If that is meant: dapo promote {self.name} {last.version} --reason WHY"
        )

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_model_version_tag(self.name, str(version.version), key, value)

    def _of(self, version: Any) -> ModelVersion:
        # SQLite leaves `model_id` empty where the source names the model.
        model_id = version.model_id or str(version.source).removeprefix("models:/")
        return ModelVersion(self.name, int(version.version), dict(version.tags), version.run_id or "", model_id)


@contextlib.contextmanager
def one_sentence(uri: str) -> Iterator[None]:
    """What MLflow refuses, and its absence, becomes an EnvironmentCheckError of one sentence.

    Args:
        uri: of the store that is asked.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if isinstance(error.__context__, OSError):  # as requests' errors are; MLflow's own words are three lines long
            raise EnvironmentCheckError(
                f"no MLflow server answers at {uri}; start it, or name another (--tracking-uri, MLFLOW_TRACKING_URI)"
            ) from error
        raise EnvironmentCheckError(f"MLflow at {uri} says: {str(error).splitlines()[0]}") from error


def _operator() -> str:
    """User and host that run this command."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # containers know no name for their user
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def logged_model(
    client: MlflowClient, experiment: str, name: str, checkpoint_uri: str, run_id: str, params: Mapping[str, str]
) -> str:
    """Id of the logged model at this place: the one the shipper made for the checkpoint, else a new one."""
    import mlflow

    found = client.search_logged_models([experiment], f"name = '{name}'")
    for model in found:
        if model.tags.get("checkpoint.uri") == checkpoint_uri:
            return str(model.model_id)
    made = mlflow.create_external_model(
        name=name,
        source_run_id=run_id or None,
        experiment_id=experiment,
        params=dict(params),
        tags={"checkpoint.uri": checkpoint_uri},
        model_type="checkpoint",
    )
    return str(made.model_id)
