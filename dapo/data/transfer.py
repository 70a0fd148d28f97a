"""Moving a repository's files onto this machine: in parts that a later attempt continues, named only once verified."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo.data.retry import ATTEMPTS, pause, short
from dapo.data.storage import Progress, require_room, sha256_of
from dapo.errors import DapoError

_FILES_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit. Large files have a sha256, all others a git blob id; either proves the content."""

    path: str
    size: int
    sha256: str | None
    blob_id: str | None

    def is_content_of(self, path: Path) -> bool:
        """Whether a local file is this one, by size and checksum."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return sha256_of(path) == self.sha256
        blob = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        blob.update(path.read_bytes())
        return blob.hexdigest() == self.blob_id


@dataclass(frozen=True, slots=True)
class Transfer:
    """Downloads of one commit.

    Args:
        label: what is downloaded, for messages.
        url: of a file's path.
        why: the reason of an answer that may be better next time; raises where it will not be.
        error: what to raise.
    """

    label: str
    url: Callable[[str], str]
    why: Callable[[Any], str]
    error: type[DapoError]

    def run(self, files: Sequence[HubFile], folder: Path, progress: Progress) -> None:
        """Fetches what is missing in `folder`; a file that has its name there was verified before it got it.

        Raises:
            error: no room on the disk (said before anything is fetched), or a file cannot be had.
        """
        missing = [f for f in files if not (folder / f.path).exists()]
        if not missing:
            return
        parts = {f.path: folder / f"{f.path}.part" for f in missing}
        begun = sum(part.stat().st_size for part in parts.values() if part.exists())
        needed = sum(f.size for f in missing) - begun
        require_room(folder, needed, self.label, self.error)
        total = sum(f.size for f in files)
        done, guard, stop = total - needed, threading.Lock(), threading.Event()

        def arrived(count: int) -> None:
            nonlocal done
            with guard:
                done = max(0, min(done + count, total))
                progress(done, total, f"bytes of {self.label}")

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            fetches = [pool.submit(self._fetch, f, parts[f.path], arrived, stop) for f in missing]
            try:
                for fetch in as_completed(fetches):
                    fetch.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _fetch(self, file: HubFile, part: Path, arrived: Callable[[int], None], stop: threading.Event) -> None:
        """One file: continue its part, compare the checksum, give it its name."""
        part.parent.mkdir(parents=True, exist_ok=True)
        bar = _byte_counter(arrived, stop)
        reason, failures = "", 0
        while failures < ATTEMPTS:
            if failures:
                pause(failures, f"{self.label}, {file.path}: {reason}", stop)
            if stop.is_set():
                return
            before = _begun(part, file.size)
            try:
                reason = self._continue(file, part, before, bar)
            except _NoLongerWanted:
                return
            if not reason and file.is_content_of(part):
                os.replace(part, part.with_suffix(""))
                return
            if not reason:
                arrived(-part.stat().st_size)
                part.unlink()
                checksum = file.sha256 or file.blob_id
                reason = f"what arrived does not have the checksum {checksum} that the hub states"
            failures = 1 if _begun(part, file.size) > before else failures + 1
        raise self.error(
            f"{self.label}: {file.path} could not be fetched: {reason} ({ATTEMPTS} attempts); start again to continue, "
            "finished files are kept"
        )

    def _continue(self, file: HubFile, part: Path, begun: int, bar: type[Any]) -> str:
        """Appends what is missing to a part; returns why it ended early, empty where it did not."""
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined, unused-ignore]

        try:
            with part.open("r+b" if begun else "wb") as out:
                out.seek(begun)
                http_get(
                    self.url(file.path),
                    out,
                    resume_size=begun,
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    displayed_filename=file.path,
                    tqdm_class=bar,
                )
        except HfHubHTTPError as error:
            return self.why(error)
        except OSError as error:
            if error.errno is not None:
                raise  # of this machine: no room, no permission
            part.unlink(missing_ok=True)
            return f"another size than {file.size} bytes arrived"
        except Exception as error:
            if not is_transport(error):
                raise
            return f"connection broken ({short(error)})"
        return ""


class _NoLongerWanted(Exception):
    """Another file of the same download failed, or the user gave up."""


def is_transport(error: Exception) -> bool:
    """Whether an exception is about the connection."""
    # huggingface_hub 1 raises httpx's exceptions, huggingface_hub 2 httpx2's: same names, other modules.
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


def _begun(part: Path, size: int) -> int:
    """Bytes of a part that are worth continuing."""
    if part.exists() and part.stat().st_size > size:
        part.unlink()
    return part.stat().st_size if part.exists() else 0


def _byte_counter(arrived: Callable[[int], None], stop: threading.Event) -> type[Any]:
    """The client's progress bar, drawing nothing: it counts, and ends a download that is no longer wanted."""
    from tqdm import tqdm

    class Counter(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **(settings | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            arrived(int(n or 0))
            if stop.is_set():
                raise _NoLongerWanted

    return Counter
