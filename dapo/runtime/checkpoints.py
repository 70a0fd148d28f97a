"""Checkpoints of a run: written whole or not at all, found again, pruned.

A folder `checkpoints/step-000020` exists only after everything in it was written and flushed: it is filled under a
temporary name and renamed, its `manifest.json` (size and SHA-256 of every file) written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dapo.errors import CheckpointError
from dapo.observe.layout import REGISTERED, RunFolder

MANIFEST = "manifest.json"
CONTROLLER = "controller.json"


def write(
    folder: RunFolder,
    step: int,
    controller: Mapping[str, Any],
    metrics: Mapping[str, float],
    fill: Callable[[Path], None],
) -> Path:
    """Write the checkpoint of `step`; `fill` puts the policy's files into the (temporary) folder it is given.

    Raises:
        CheckpointError: it could not be written (disk full, no permission); no partial checkpoint is left.
    """
    final = folder.checkpoint(step)
    temporary = final.with_name(f".writing-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        (temporary / CONTROLLER).write_text(json.dumps(controller))
        files = {
            str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": _sha256(p)}
            for p in sorted(temporary.rglob("*"))
            if p.is_file()
        }
        manifest = temporary / MANIFEST
        manifest.write_text(json.dumps({"step": step, "metrics": dict(metrics), "files": files}, indent=1))
        _flush(manifest)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint of step {step} could not be written to {final}: {error.strerror or error}. Nothing partial "
            f"was left, older checkpoints are untouched; free space there and start the run again, it resumes"
        ) from error
    return final


def newest(folder: RunFolder, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; a damaged one is skipped, aloud, for the one before it."""
    for path in sorted(folder.checkpoints.glob("step-*"), reverse=True):
        fault = damage(path)
        if fault is None:
            return path
        warn(f"checkpoint {path} is damaged ({fault}); trying the one before it")
    return None


def damage(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None where every file is there with the size and content of its manifest."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable {MANIFEST}: {error}"
    for name, told in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != told["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {told['bytes']}"
        if _sha256(file) != told["sha256"]:
            return f"{name} has other content than was written"
    return None


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def metrics_of(path: Path) -> dict[str, float]:
    return dict(json.loads((path / MANIFEST).read_text())["metrics"])


def controller_state(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / CONTROLLER).read_text()))


def best(folder: RunFolder) -> Path | None:
    """The checkpoint with the highest held-out accuracy; the earliest of equals; None where none was validated."""
    accuracy = {p: metrics_of(p).get("val/accuracy") for p in sorted(folder.checkpoints.glob("step-*"))}
    measured = {p: value for p, value in accuracy.items() if value is not None}
    return max(measured, key=measured.__getitem__, default=None)


def prune(folder: RunFolder, keep: int, best: Path | None) -> None:
    """Remove all but the `keep` newest checkpoints, the best one, and those the registry refers to."""
    for path in sorted(folder.checkpoints.glob("step-*"), reverse=True)[keep:]:
        if path != best and not (path / REGISTERED).exists():
            shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
