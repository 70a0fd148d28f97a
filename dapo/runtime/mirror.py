"""Checkpoints in object storage: every whole one is copied to `train.mirror`, from where other machines resume.

Layout of ``<mirror>/<run id>/``: checkpoints/step-NNNNNN as in the run folder, and records/ with the journal and how
much MLflow and Prefect have received. A checkpoint's manifest.json is uploaded last: it makes the checkpoint valid.
Training never waits for an upload, except at its end, and never fails for one: an upload that fails is an alarm.
"""

from __future__ import annotations

import json
import logging
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dapo.data.remote import RemoteFolder
from dapo.data.retry import attempt, short
from dapo.errors import CheckpointError, ConfigError
from dapo.observe.run_folder import REGISTERED, RunFolder
from dapo.runtime import checkpoints
from dapo.runtime.checkpoints import MANIFEST

TOLD_EVERY_S = 60.0
_RECORDS = ("mlflow.json", "prefect.json", "manifest.json", "journal.jsonl")
"""In this order: an offset that was copied lies within the journal that was copied after it."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class Mirror:
    """Uploads of one run, in a thread.

    Args:
        url: `train.mirror`.
        folder: the run's folder.
        keep: newest checkpoints kept there; the best one and those the registry refers to are kept besides.

    Raises:
        EnvironmentCheckError: no driver for the URL.
    """

    def __init__(self, url: str, folder: RunFolder, keep: int) -> None:
        self.url, self.folder, self.keep = url, folder, keep
        self.remote = RemoteFolder(f"{url.rstrip('/')}/{folder.id}")
        self._waiting: queue.Queue[Path | None] = queue.Queue()
        self._problems: queue.Queue[str] = queue.Queue()
        self._now = ""
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="checkpoint-mirror")
        self._thread.start()

    def put(self, checkpoint: Path) -> None:
        """Upload a whole checkpoint; returns at once."""
        self._waiting.put(checkpoint)

    def problems(self) -> list[str]:
        """Uploads that failed since the last call, one sentence each."""
        found = []
        while not self._problems.empty():
            found.append(self._problems.get())
        return found

    def finish(self, limit_s: float | None = None) -> None:
        """Wait for pending uploads; after `limit_s` seconds they are left for the next start: a problem."""
        self._waiting.put(None)
        waited = 0.0
        while self._thread.is_alive():
            pause = min(TOLD_EVERY_S, TOLD_EVERY_S if limit_s is None else max(0.0, limit_s - waited))
            self._thread.join(pause)
            waited += pause
            if self._thread.is_alive():
                if limit_s is not None and waited >= limit_s:
                    self._hurry.set()
                    self._problems.put(f"{self._now} is not complete in {self.remote.url}; the next start uploads it")
                    return
                log.info("the run waits for an upload to %s: %s", self.remote.url, self._now)

    def restore(self) -> Path | None:
        """The newest whole checkpoint of the mirror in the run's folder, where that has none as new.

        Returns:
            The folder; None where nothing was downloaded. Afterwards the newest local one is uploaded where it is
            missing: an earlier upload may have been interrupted.

        Raises:
            CheckpointError: the mirror cannot be read and the run's folder is empty: whether there is something to
                go on from cannot be known.
        """
        here = checkpoints.newest(self.folder, lambda text: log.warning("%s", text))
        try:
            with _readable(self.url):
                whole = attempt(lambda: _whole(self.remote), f"listing {self.remote.url}")
        except CheckpointError as error:
            if here is None:
                raise
            self._problems.put(f"{error}; the run goes on from {here.name}")
            whole = {}
        for name in sorted(whole, reverse=True):
            if here is not None and name <= here.name:
                break
            fault = self._download(name, whole[name])
            if fault is None:
                return self.folder.checkpoints / name
            log.warning("%s/checkpoints/%s is not used (%s); trying the one before it", self.remote.url, name, fault)
        if here is not None and here.name not in whole:
            self.put(here)
        return None

    def _download(self, name: str, manifest: dict[str, Any]) -> str | None:
        """Why it could not be downloaded whole; None on success."""
        final = self.folder.checkpoints / name
        temporary = final.with_name(f".writing-{name}")
        shutil.rmtree(temporary, ignore_errors=True)
        log.info("downloading %s from %s", name, self.remote.url)
        try:
            for file in (*manifest["files"], MANIFEST):
                place = f"checkpoints/{name}/{file}"
                attempt(partial(self.remote.get, place, temporary / file), f"downloading {place}")
            fault = checkpoints.damage(temporary)
            if fault is None:
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
            return fault
        except Exception as error:  # every driver has its own kinds
            return short(error)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _loop(self) -> None:
        while (checkpoint := self._waiting.get()) is not None:
            self._now = checkpoint.name
            try:
                if checkpoint.is_dir():  # pruned meanwhile: a newer one follows
                    self._upload(checkpoint)
                self._prune()
            except Exception as error:  # every driver has its own kinds, and none may end the run
                if checkpoint.is_dir():
                    self._problems.put(
                        f"{checkpoint.name} was not copied to {self.remote.url} ({short(error)}); it is whole in the "
                        "run folder, and the next checkpoint is tried again"
                    )

    def _upload(self, checkpoint: Path) -> None:
        place = f"checkpoints/{checkpoint.name}"
        manifest = (checkpoint / MANIFEST).read_bytes()
        if self._try(self.remote.read, f"{place}/{MANIFEST}") == manifest:
            return
        self._remove(place)  # an interrupted upload, or an older checkpoint of this step
        for file in json.loads(manifest)["files"]:
            self._try(self.remote.put, checkpoint / file, f"{place}/{file}")
        self._put_records()
        self._try(self.remote.put, checkpoint / MANIFEST, f"{place}/{MANIFEST}")
        log.info("%s is complete in %s", checkpoint.name, self.remote.url)

    def _put_records(self) -> None:
        tables = sorted((self.folder.root / "validation").glob("*.jsonl"))
        there = set(self._try(self.remote.names, "records/validation"))
        for file in (*(t for t in tables if t.name not in there), *(self.folder.root / n for n in _RECORDS)):
            if file.is_file():
                self._try(self.remote.put, file, f"records/{file.relative_to(self.folder.root)}")

    def _prune(self) -> None:
        """Remove what `checkpoints.prune` would, and what interrupted uploads left."""
        whole = attempt(partial(_whole, self.remote), f"listing {self.remote.url}", self._hurry)
        accuracy = {n: m["metrics"]["val/accuracy"] for n, m in whole.items() if "val/accuracy" in m["metrics"]}
        keep = {*sorted(whole)[-self.keep :], *([max(sorted(accuracy), key=accuracy.__getitem__)] if accuracy else [])}
        for name in self._try(self.remote.names, "checkpoints"):
            place = f"checkpoints/{name}"
            mark = self.folder.checkpoints / name / REGISTERED
            if name in whole and mark.is_file():
                self._try(self.remote.put, mark, f"{place}/{REGISTERED}")
            elif name not in keep and self._try(self.remote.read, f"{place}/{REGISTERED}") is None:
                self._remove(place)

    def _remove(self, place: str) -> None:
        """The manifest first: a half-removed folder then is no checkpoint."""
        self._try(self.remote.remove, f"{place}/{MANIFEST}")
        self._try(self.remote.remove, place)

    def _try(self, doing: Callable[..., T], *given: Any) -> T:
        return attempt(partial(doing, *given), f"{doing.__name__} {given[-1]} of {self.remote.url}", self._hurry)


def restore_records(url: str, folder: RunFolder) -> bool:
    """The run's journal and what goes with it, where this machine has none: the run goes on as one in MLflow.

    Returns:
        Whether there were any.

    Raises:
        EnvironmentCheckError: no driver for the URL.
        CheckpointError: the mirror cannot be read.
    """
    if folder.journal.exists():
        return False
    remote = RemoteFolder(f"{url.rstrip('/')}/{folder.id}/records")
    with _readable(url):
        names = attempt(remote.files, f"listing {remote.url}")
        # The journal last: with it the run is no longer taken for a new one.
        for name in sorted(names, key=lambda n: n == folder.journal.name):
            attempt(partial(remote.get, name, folder.root / name), f"downloading {remote.url}/{name}")
    return bool(names)


def require_unused(url: str, folder: RunFolder) -> None:
    """For a run from the beginning: the mirror must not have an earlier one of the same configuration.

    Raises:
        ConfigError: it has.
        EnvironmentCheckError: no driver for the URL.
        CheckpointError: the mirror cannot be read.
    """
    remote = RemoteFolder(f"{url.rstrip('/')}/{folder.id}")
    with _readable(url):
        there = attempt(lambda: remote.names("checkpoints"), f"listing {remote.url}")
    if there:
        raise ConfigError(
            f"train.resume=never, and train.mirror has checkpoints of this configuration in {remote.url}: remove them, "
            "or give the run another name"
        )


@contextmanager
def _readable(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every driver has its own kinds
        raise CheckpointError(
            f"train.mirror={url} cannot be read ({short(error)}): make it reachable, or set train.mirror=null to start "
            "from the beginning"
        ) from None


def _whole(remote: RemoteFolder) -> dict[str, dict[str, Any]]:
    """Manifests of the complete checkpoints by name."""
    found = {}
    for name in remote.names("checkpoints"):
        content = remote.read(f"checkpoints/{name}/{MANIFEST}")
        try:
            manifest = json.loads(content) if content else {}
        except ValueError:
            continue  # a file system shows a file before it is whole
        if isinstance(manifest, dict) and {"files", "metrics", "step"} <= set(manifest):
            found[name] = manifest
    return found
