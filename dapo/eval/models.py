"""Which model is meant: a checkpoint or run folder, a registered model, a hub repository, or the configured base."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dapo.config.model import FolderModel, HubModel, ModelSource
from dapo.config.run import RunConfig
from dapo.data.fetch import weights_key
from dapo.data.remote import is_url
from dapo.errors import ConfigError, WeightsError
from dapo.observe.journal import read
from dapo.observe.registry import Registry
from dapo.observe.run_folder import RunFolder
from dapo.observe.shipper import tracking_uri

BASE = "base"
FORMS = (
    "a checkpoint, run or Hugging Face folder, models:/NAME@ALIAS or models:/NAME/VERSION, a hub repository "
    f"OWNER/NAME[@REVISION], or `{BASE}` for the weights the configuration starts from"
)
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True)
class Model:
    """Requested weights, before they are fetched."""

    reference: str
    """As it was given, for people."""
    name: str
    """Short; for folders and run names."""
    source: ModelSource
    """Where the weights come from."""
    digest: str
    """Changes with the weights."""
    run_id: str = ""
    """MLflow run that trained it, where one is known."""
    model_id: str = ""
    """MLflow's logged model, where it is registered."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"source": self.source.model_dump(mode="json")}


def find_model(reference: str, config: RunConfig) -> Model:
    """The model a reference means; nothing is fetched.

    Args:
        reference: one of `FORMS`.
        config: `model.source` for the base, `mlflow` for the registry, `data.cache_dir` for the hub.

    Raises:
        ConfigError: no such reference, version or alias.
        WeightsError: the folder or repository is not there, or holds no model.
    """
    if reference == BASE:
        return _of_source(reference, config.model.source, config)
    if match := _REGISTERED.fullmatch(reference):
        version = Registry(tracking_uri(config), match["name"]).require(match["alias"] or match["version"])
        name = f"{version.name}-v{version.version}"
        source = FolderModel(path=str(version.folder))
        return Model(reference, name, source, version.tags["checkpoint.digest"], version.run_id, version.model_id)
    if is_url(reference):
        return _of_source(reference, FolderModel(path=reference.rstrip("/")), config)
    path = Path(reference).expanduser()
    if path.is_dir():
        return _of_folder(reference, path.resolve(), config)
    if match := _HUB.fullmatch(reference):
        return _of_source(reference, HubModel(repo=match["repo"], revision=match["revision"] or "main"), config)
    raise ConfigError(f"model {reference!r} is not a folder here and not a name; give {FORMS}")


def checkpoint_of(run: Path) -> Path:
    """The checkpoint a run is represented by: the best by validation accuracy, else the newest.

    Raises:
        WeightsError: it has none (any more).
    """
    saved = [e for e in read(RunFolder(run).journal) if e.kind == "checkpoint" and (run / e.data["path"]).is_dir()]
    if not saved:
        raise WeightsError(f"run {run} has no checkpoint; train until one is saved (train.save_freq)")
    measured = [e for e in saved if "val/accuracy" in e.data["metrics"]]
    best = max(measured, key=lambda e: e.data["metrics"]["val/accuracy"]) if measured else saved[-1]
    return run / str(best.data["path"])


def digest_of(checkpoint: Path) -> str:
    """16 hex digits of a checkpoint's Hugging Face files, from its manifest: the same wherever it is copied to."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    ours = sorted((name, entry["sha256"]) for name, entry in files.items() if name.startswith("hf/"))
    return hashlib.sha256(json.dumps(ours).encode()).hexdigest()[:16]


def _of_folder(reference: str, path: Path, config: RunConfig) -> Model:
    if (path / "journal.jsonl").is_file():
        path = checkpoint_of(path)
    elif path.name == "hf" and (path.parent / "manifest.json").is_file():
        path = path.parent
    if not (path / "hf").is_dir():
        if not (path / "config.json").is_file():
            raise WeightsError(
                f"{path} is neither a checkpoint nor a Hugging Face folder (no config.json); give {FORMS}"
            )
        return _of_source(reference, FolderModel(path=str(path)), config)
    run = RunFolder(path.parent.parent)
    try:
        run_id = json.loads(run.mlflow.read_text())["run_id"]
    except (OSError, ValueError, KeyError):
        run_id = ""
    return Model(reference, f"{run.id}-{path.name}", FolderModel(path=str(path / "hf")), digest_of(path), run_id)


def _of_source(reference: str, source: ModelSource, config: RunConfig) -> Model:
    if source.kind == "tiny":
        from dapo.data.tiny import tiny_key

        return Model(reference, "tiny", source, tiny_key(source))
    digest = weights_key(source, Path(config.data.cache_dir))
    name = source.repo if source.kind == "hub" else source.path
    return Model(reference, Path(name).name, source, digest)
