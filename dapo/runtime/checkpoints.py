"""Checkpoints of a run: written whole or not at all, found again, pruned.

A folder `checkpoints/step-000020` exists only after everything in it was written and flushed: it is filled under a
temporary name and renamed, its `manifest.json` (size and SHA-256 of every file) written last.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo.data.storage import sha256_of
from dapo.errors import CheckpointError, DapoError
from dapo.observe.journal import Journal
from dapo.observe.run_folder import REGISTERED, RunFolder

if TYPE_CHECKING:
    from dapo.train.policy import Policy

MANIFEST = "manifest.json"
CONTROLLER = "controller.json"
_WRITING = ".writing-"


class Checkpoints:
    """A run's checkpoints, written beside its training, one at a time.

    `begin` waits until the policy's state and weights are copied to host memory. Its workers then write; when they are
    done, a thread verifies and renames the folder (`seal`). `poll` checks for that without waiting, and once it is done
    prunes old checkpoints and writes to the journal. A failure raises an alarm only: older checkpoints stay, training
    goes on, and `retry_due` asks for another try after the next step. Only `finish` raises.

    Args:
        keep: newest checkpoints that are not pruned.
        whole: called with each checkpoint as soon as it is one.
    """

    def __init__(
        self,
        folder: RunFolder,
        journal: Journal,
        policy: Policy,
        keep: int,
        whole: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.folder, self.journal, self.policy, self.keep, self._whole = folder, journal, policy, keep, whole
        self.failure: CheckpointError | None = None
        """Of the newest checkpoint."""
        self._newest: int | None = None
        self._writing: _Writing | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="seal")

    @property
    def retry_due(self) -> bool:
        """The newest checkpoint could not be written."""
        return self.failure is not None

    def begin(self, step: int, controller: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Copy what the checkpoint of `step` is made of; waits for the one before it first.

        Args:
            controller: its state, as JSON can hold it.
            metrics: of this step's validation.
        """
        self.poll(wait=True)
        if self._newest == step:
            return
        started = time.perf_counter()
        try:
            temporary = begin(self.folder, step)
            (temporary / "state").mkdir()
            self.policy.save(temporary / "state")
            self.policy.export(temporary / "hf")
        except (OSError, CheckpointError) as error:
            self._failed(step, error)
            return
        waited = time.perf_counter() - started
        # As text: the controller goes on changing what its state refers to.
        self._writing = _Writing(step, json.dumps(controller), dict(metrics), started, waited)

    def poll(self, *, wait: bool = False) -> None:
        """Complete the checkpoint being written if its files are there; `wait`: block until they are."""
        writing = self._writing
        if writing is None:
            return
        looked = time.perf_counter()
        try:
            path = self._sealed(writing, wait)
        except (OSError, DapoError) as error:
            self._failed(writing.step, error)
            return
        writing.waited += time.perf_counter() - looked
        if path is None:
            return
        self._writing, self.failure, self._newest = None, None, writing.step
        with self._alarmed(writing.step, "checkpoint_prune", f"{path} is whole, but an older one could not be removed"):
            prune(self.folder, self.keep, best(self.folder))
        with self._alarmed(writing.step, "checkpoint_after", f"{path} is whole, but what follows a checkpoint failed"):
            seconds = time.perf_counter() - writing.started
            self._tell(path, best(self.folder), seconds=seconds, waited=writing.waited)
            self._whole(path)

    def _sealed(self, writing: _Writing, wait: bool) -> Path | None:
        """The checkpoint, or None while it is not whole yet."""
        if writing.sealed is None:
            if not self.policy.written(wait=wait):
                return None
            writing.sealed = self._thread.submit(seal, self.folder, writing.step, writing.controller, writing.metrics)
        return writing.sealed.result() if wait or writing.sealed.done() else None

    def finish(self) -> None:
        """Wait for the checkpoint being written.

        Raises:
            CheckpointError: the run's newest checkpoint could not be written.
        """
        self.poll(wait=True)
        if self.failure is not None:
            raise self.failure

    def resumed(self, path: Path) -> None:
        """The run resumes from here; the checkpoint's event is added to the journal if it is missing."""
        self._newest = step_of(path)
        self._tell(path, best(self.folder), seconds=0.0, waited=0.0)

    def _tell(self, path: Path, best_path: Path | None, *, seconds: float, waited: float) -> None:
        self.journal.append(
            "checkpoint",
            step_of(path),
            path=str(path.relative_to(self.folder.root)),
            metrics=metrics_of(path),
            best=path == best_path,
            seconds=seconds,
            waited=waited,
        )

    @contextmanager
    def _alarmed(self, step: int, name: str, message: str) -> Iterator[None]:
        """An error here must not end a training whose checkpoint is good."""
        try:
            yield
        except (OSError, ValueError, DapoError) as error:
            self.journal.append("alarm", step, name=name, message=f"{message}: {type(error).__name__}: {error}")

    def _failed(self, step: int, error: OSError | DapoError) -> None:
        self._writing = None
        with suppress(OSError, DapoError):
            # A write of this checkpoint may go on beside the one that failed; its error is not the next one's.
            self.policy.written(wait=True)
        shutil.rmtree(_temporary(self.folder, step), ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self.failure = CheckpointError(
            f"checkpoint of step {step} could not be written to {self.folder.checkpoint(step)}: {reason}. Nothing "
            "partial was left, older checkpoints are untouched; free space there: it is tried again after the next "
            "step, and a run that was started again goes on from the newest checkpoint"
        )
        self.journal.append("alarm", step, name="checkpoint_failed", message=str(self.failure))


@dataclass
class _Writing:
    """The checkpoint being written."""

    step: int
    controller: str
    metrics: dict[str, float]
    started: float
    waited: float
    """Seconds that training stood still for it so far."""
    sealed: Future[Path] | None = None


def begin(folder: RunFolder, step: int) -> Path:
    """A fresh temporary folder to fill; what a killed run left half written is removed."""
    temporary = _temporary(folder, step)
    for left in folder.checkpoints.glob(f"{_WRITING}*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def seal(folder: RunFolder, step: int, controller: str, metrics: Mapping[str, float]) -> Path:
    """Make a checkpoint of the filled temporary folder: sizes and sums, everything flushed, then the rename.

    Raises:
        OSError: it cannot be written (disk full, no permission).
    """
    final, temporary = folder.checkpoint(step), _temporary(folder, step)
    (temporary / CONTROLLER).write_text(controller)
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        _flush(path)
        files[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({"step": step, "metrics": dict(metrics), "files": files}, indent=1))
    _flush(manifest)
    if final.exists():  # a damaged one whose step was redone
        _discard(final)
    os.replace(temporary, final)
    _flush(folder.checkpoints)
    return final


def newest(folder: RunFolder, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; a damaged one is skipped with a warning, for the one before it."""
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
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if sha256_of(file) != entry["sha256"]:
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
    measured: dict[Path, float] = {}
    for path in sorted(folder.checkpoints.glob("step-*")):
        try:
            measured[path] = metrics_of(path)["val/accuracy"]
        except (OSError, ValueError, KeyError):
            continue  # not validated, or damaged
    return max(measured, key=measured.__getitem__, default=None)


def prune(folder: RunFolder, keep: int, best: Path | None) -> None:
    """Remove all but the `keep` newest checkpoints, the best one, and those the registry refers to."""
    for path in sorted(folder.checkpoints.glob("step-*"), reverse=True)[keep:]:
        if path != best and not (path / REGISTERED).exists():
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint; killed half-way, what is left no longer looks like one, and `begin` removes it."""
    gone = path.with_name(f"{_WRITING}{path.name}-old")
    os.replace(path, gone)
    shutil.rmtree(gone)


def _temporary(folder: RunFolder, step: int) -> Path:
    final = folder.checkpoint(step)
    return final.with_name(f"{_WRITING}{final.name}")


def _flush(path: Path) -> None:
    """To the disk; of a folder, its names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
