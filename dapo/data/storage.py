"""Writing large things into a shared folder: atomically, once, and with a clear error when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from dapo.errors import DapoError

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called as (done, total, what); `what` names the unit, for example "rows" or "bytes of model org/name"."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WAIT_S = 10.0


def quiet(done: int, total: int, what: str) -> None:
    """Progress callback that does nothing."""


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive(lock_file: Path, doing: str) -> Iterator[None]:
    """A lock between processes; one that waits logs for what, repeatedly.

    Args:
        lock_file: beside the thing that is made; its folder is created.
        doing: what the holder does, for the message of those who wait.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock: BaseFileLock = FileLock(lock_file)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_WAIT_S)
        except Timeout:
            hint = "" if isinstance(lock, FileLock) else " (if no such process runs, delete that file)"
            log.warning("waiting for another process that is %s; it holds %s%s", doing, lock.lock_file, hint)
        except NotImplementedError:
            # Some network file systems have no flock; a lock by existence works there but outlives a killed process.
            lock = SoftFileLock(f"{lock_file}.exists")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well and disappears when it does not.

    Folders that killed processes left behind are removed first, so call it under `exclusive`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)  # only an unusable one is made again
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def room_on(folder: Path, writing: str, error: type[DapoError]) -> Iterator[None]:
    """Turns "no space left on device", wherever it happens inside, into one sentence with the remedy."""
    try:
        yield
    except OSError as cause:
        if cause.errno not in _NO_ROOM:
            raise
        raise error(
            f"no room left while writing {writing} to {folder} ({gib(free_bytes(folder))} free, {cause.strerror}); "
            "free some space or set data.cache_dir to a larger disk"
        ) from None


def require_room(folder: Path, needed: int, what: str, error: type[DapoError]) -> None:
    """Refuses before anything is written.

    Raises:
        error: `needed` bytes are more than the folder's disk has free.
    """
    free = free_bytes(folder)
    if needed > free:
        raise error(
            f"{what} needs {gib(needed)} more, {folder} has {gib(free)} free; "
            "free some space or set data.cache_dir to a larger disk"
        )


def free_bytes(folder: Path) -> int:
    """Of the disk a folder is on or will be on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
