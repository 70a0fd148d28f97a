"""Model weights on this machine: from a hub or a URL into the shared cache, or a local folder used in place.

They are always verified.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from dapo.config.model import FolderModel, HubModel
from dapo.data.hub import HubRepo
from dapo.data.remote import content_key, fetch_folder, is_url
from dapo.data.storage import Progress, quiet
from dapo.errors import WeightsError

SUPPORTED = (
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Architectures (config.json) that the trainer and the engines know."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Safetensors only: other formats run code when they are read.
_WANTED = ("model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_KEY = "model.source.path"
_MAX_HEADER_BYTES = 100 * 2**20


def fetch_weights(source: HubModel | FolderModel, cache: Path, progress: Progress = quiet) -> Path:
    """A Hugging Face folder with whole, verified weights.

    From a hub: in the cache, shared by all runs, with a manifest.json that names the commit; only what is missing is
    downloaded, by one process. A folder at a URL is downloaded likewise, a local one is checked and used where it is.

    Args:
        cache: folder shared by all runs.
        progress: called with bytes while downloading.

    Raises:
        WeightsError: the weights cannot be had, do not fit on the disk, are partial, or are of a model we do not know.
    """
    match source:
        case FolderModel() if is_url(source.path):
            folder = fetch_folder(source.path, cache, _KEY, WeightsError, progress)
        case FolderModel():
            folder = _folder(source)
        case HubModel():
            repo = _repo(source, cache)
            commit = repo.resolve()
            listed = repo.files(commit)
            names = {f.path for f in listed}
            if not any(fnmatch.fnmatch(name, _WANTED[0]) for name in names):
                raise WeightsError(f"model {source.repo} has no safetensors weights at its top level; convert it first")

            def inspect(downloaded: Path) -> None:
                check_architecture(downloaded)
                _require_shards(downloaded, names, f"model {source.repo} on the hub")

            wanted = [f for f in listed if _is_wanted(f.path)]
            folder = repo.snapshot(commit, wanted, inspect=inspect, progress=progress)
    verify_weights(folder)
    return folder


def weights_key(source: HubModel | FolderModel, cache: Path) -> str:
    """16 hex digits that change with the weights: the commit, or a folder's configuration, tensors, sizes and times.

    Raises:
        WeightsError: the repository or folder is not there.
    """
    parts: Any
    match source:
        case HubModel():
            parts = [source.repo, _repo(source, cache).resolve()]
        case FolderModel() if is_url(source.path):
            return content_key(source.path, _KEY, WeightsError)
        case FolderModel():
            # Reading 60 GB to name a stage would take minutes; a changed file has another time or size.
            entries = sorted(path for path in _folder(source).iterdir() if path.is_file())
            parts = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in entries]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_architecture(folder: Path) -> str:
    """The architecture of config.json.

    Raises:
        WeightsError: there is none, or it is not one of `SUPPORTED`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    named = _read_json(path).get("architectures") or ["none"]
    if named[0] not in SUPPORTED:
        raise WeightsError(f"{path}: architecture {named[0]} is not supported; supported: {', '.join(SUPPORTED)}")
    return str(named[0])


def verify_weights(folder: Path) -> None:
    """Checks that a folder is of a known architecture and that every tensor is whole: all shards of the index are
    there, each as long as its header says, each with the tensors the index puts into it.

    Raises:
        WeightsError: names the file and what is wrong with it.
    """
    check_architecture(folder)
    there = {path.name for path in folder.iterdir()}
    shards = _require_shards(folder, there, str(folder))
    for name, expected in shards.items():
        found = _tensors_of(folder / name)
        if missing := expected - found:
            raise WeightsError(
                f"{folder / name} lacks {len(missing)} tensors that {INDEX} puts into it (first: {min(missing)}); "
                "fetch or copy the folder again"
            )


def _require_shards(folder: Path, names: set[str], place: str) -> dict[str, set[str]]:
    """Tensors by file, as the index has them; every file must be among `names`."""
    if INDEX not in names:
        if SINGLE not in names:
            raise WeightsError(f"{place} has neither {SINGLE} nor {INDEX}; only safetensors weights are loaded")
        return {SINGLE: set()}
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{folder / INDEX} has no weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        shards.setdefault(str(name), set()).add(tensor)
    if missing := sorted(shards.keys() - names):
        raise WeightsError(
            f"{place} lacks {len(missing)} of the {len(shards)} files that {INDEX} names (first: {missing[0]}); "
            "it was not copied or uploaded completely"
        )
    return shards


def _tensors_of(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file of the right length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if length > min(_MAX_HEADER_BYTES, size):
            raise WeightsError(f"{path} ({size} bytes) is not a safetensors file; fetch or copy it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"{path} is not a safetensors file (bad header); fetch or copy it again") from None
    if size != whole:
        raise WeightsError(f"{path} has {size} bytes, its header says {whole}; fetch or copy it again")
    return set(header) - {"__metadata__"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return value


def _is_wanted(path: str) -> bool:
    return path != "manifest.json" and "/" not in path and any(fnmatch.fnmatch(path, name) for name in _WANTED)


def _repo(source: HubModel, cache: Path) -> HubRepo:
    return HubRepo(source.repo, kind="model", revision=source.revision, endpoint=source.endpoint, cache=cache)


def _folder(source: FolderModel) -> Path:
    folder = Path(source.path).expanduser().resolve()
    if not folder.is_dir():
        raise WeightsError(f"model.source.path={source.path} is not a folder")
    return folder
