"""Folders in object storage by URL (s3://bucket/folder, gs://..., file:///..., memory://...), whatever fsspec knows.

Credentials and endpoints come from where the driver looks for them (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, ~/.aws); none is kept in a configuration.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo.data.retry import attempt, short
from dapo.data.storage import Progress, exclusive, quiet, require_room, room_on, written_whole
from dapo.errors import DapoError, EnvironmentCheckError

PROBE_S = 30.0
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
# Fields that distinguish versions of an object, by driver; the first that is present counts.
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object."""

    size: int
    version: str
    """Changes when the content does (an ETag, a time)."""


class RemoteFolder:
    """A folder at a URL; objects are named relative to it.

    Its methods raise what the driver raises (OSError and, where there are no credentials or no answer, the driver's own
    kinds); `attempt` retries them.

    Args:
        url: with its protocol.

    Raises:
        EnvironmentCheckError: fsspec does not know the protocol, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            remedy = f"pip install {package}=={fsspec.__version__}" if package else "install the driver it names"
            raise EnvironmentCheckError(f"{url} cannot be opened: {error}; {remedy}") from None
        except ValueError as error:
            raise EnvironmentCheckError(f"{url} cannot be opened: {error}; use s3://, gs://, file:// ...") from None
        self._root = str(root).rstrip("/")
        # Object stores have no folders to make, and their drivers would make a misspelt bucket instead.
        self._has_folders = protocol not in _PACKAGES

    def files(self, under: str = "") -> dict[str, StoredObject]:
        """All objects below (relative names), in one listing."""
        self._fs.invalidate_cache()
        root = self._path(under)
        found = self._fs.find(root, detail=True)
        return {
            name.removeprefix(self._root).lstrip("/"): StoredObject(int(info["size"]), _version(info))
            for name, info in sorted(found.items())
            if name != root
        }

    def names(self, under: str = "") -> list[str]:
        """Folders and objects directly below."""
        self._fs.invalidate_cache()
        try:
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._path(under), False))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes | None:
        """An object's content; None where there is none."""
        try:
            return bytes(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def put(self, file: Path, name: str) -> None:
        path = self._path(name)
        if self._has_folders:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(file), path)

    def get(self, name: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(self._path(name), str(file))

    def remove(self, name: str) -> None:
        """An object, or a folder with everything below; nothing happens where there is none."""
        self._fs.invalidate_cache()
        if self._fs.exists(self._path(name)):
            self._fs.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


def is_url(place: str) -> bool:
    return "://" in place


def fetch_folder(url: str, cache: Path, key: str, error: type[DapoError], progress: Progress = quiet) -> Path:
    """The folder at a URL as a local one in `cache/remote`, named by its content and downloaded once, whole or not.

    Args:
        url: a folder.
        cache: shared by all runs.
        key: the configuration key that holds the URL, for messages.
        error: kind that is raised.
        progress: called with bytes.

    Raises:
        error: it is not there, is empty, cannot be read, or does not fit on the disk.
    """
    folder, files = _listed(url, key, error)
    target = cache / "remote" / _digest(url, files)
    with exclusive(target.with_name(f"{target.name}.lock"), f"downloading {url}"):
        if target.is_dir():
            return target
        total = sum(file.size for file in files.values())
        target.parent.mkdir(parents=True, exist_ok=True)
        require_room(target.parent, total, url, error)
        with room_on(target.parent, url, error), written_whole(target) as temporary:
            done = 0
            for name, file in files.items():
                _fetch_file(folder, name, file, temporary / name, error)
                done += file.size
                progress(done, total, f"bytes of {url}")
    return target


def content_key(url: str, key: str, error: type[DapoError]) -> str:
    """16 hex digits that change with what lies at a URL; nothing is downloaded. Raises `error`."""
    return _digest(url, _listed(url, key, error)[1])


def probe(url: str, write: bool) -> str:
    """Whether a place can be used, found out by using it; what was done.

    Args:
        url: a folder.
        write: write, read and remove a small object; otherwise the folder must list something.

    Raises:
        EnvironmentCheckError: no driver, no credentials, no permission, nothing there, or no answer in `PROBE_S`.
    """
    folder = RemoteFolder(url)
    ended: list[BaseException | str] = []

    def look() -> None:
        try:
            ended.append(_write_probe(folder) if write else f"{len(folder.files())} objects")
        except Exception as error:
            ended.append(error)

    # Drivers try for minutes where nothing answers, each in its own way; a thread is what can be left behind.
    thread = threading.Thread(target=look, daemon=True, name="storage-probe")
    thread.start()
    thread.join(PROBE_S)
    if not ended:
        raise EnvironmentCheckError(f"{url} does not answer within {PROBE_S:.0f} s")
    if isinstance(ended[0], BaseException):
        raise EnvironmentCheckError(f"{url} cannot be {'written' if write else 'read'} ({short(ended[0])})")
    if ended[0].startswith("0 "):
        raise EnvironmentCheckError(f"{url} is empty, or not there")
    return ended[0]


def _write_probe(folder: RemoteFolder) -> str:
    import tempfile

    name = f".probe-{time.time_ns()}"
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"probe")
        file.flush()
        folder.put(Path(file.name), name)
    content = folder.read(name)
    folder.remove(name)
    if content != b"probe":
        raise OSError("an object was written and not found again")
    return "an object was written, read and removed"


def _listed(url: str, key: str, error: type[DapoError]) -> tuple[RemoteFolder, dict[str, StoredObject]]:
    folder = RemoteFolder(url)
    try:
        files = attempt(folder.files, f"listing {url}")
    except FileNotFoundError:
        files = {}
    except Exception as cause:  # as in `attempt`
        raise error(f"{key}={url} cannot be read ({short(cause)}); check the URL and the credentials") from None
    if not files:
        raise error(f"{key}={url} is empty, or not there")
    return folder, files


def _fetch_file(folder: RemoteFolder, name: str, listed: StoredObject, file: Path, error: type[DapoError]) -> None:
    def get() -> None:
        folder.get(name, file)
        if file.stat().st_size != listed.size:
            raise OSError(f"{file.stat().st_size} bytes arrived instead of {listed.size}")

    try:
        attempt(get, f"downloading {folder.url}/{name}")
    except Exception as cause:  # as in `attempt`
        raise error(f"{folder.url}/{name} cannot be downloaded ({short(cause)}); start the run again") from None


def _digest(url: str, files: dict[str, StoredObject]) -> str:
    parts = [url, *([name, file.size, file.version] for name, file in files.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _version(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
