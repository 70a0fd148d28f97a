"""A repository on a Hugging Face hub: which commit, which files, and those files on disk, whole and verified.

The client is huggingface_hub. Its own download gives up what it has when a process dies in the middle of a file, and
does not compare checksums; so files are fetched here with its transport, into parts that the next attempt continues,
and get their name only once their checksum is the hub's. What the hub's own local cache holds is taken from there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from dapo.data.retry import ATTEMPTS, pause, short
from dapo.data.storage import Progress, exclusive, quiet, room_on
from dapo.data.transfer import HubFile, Transfer, is_transport
from dapo.errors import DapoError, DataError, WeightsError
from dapo.files import write_whole

log = logging.getLogger(__name__)

_REQUEST_S = 30.0
_SMALL_BYTES = 2**20
_HEX = frozenset("0123456789abcdef")
_T = TypeVar("_T")


class HubRepo:
    """One repository at one revision.

    Args:
        repo: ``organisation/name``.
        cache: folder shared by all runs; this class keeps everything under ``cache/hub/<kind>s--<org>--<name>``.
        endpoint: base URL of the hub; None: ``HF_ENDPOINT``, else huggingface.co.

    Every method raises WeightsError (models) or DataError (data sets).
    """

    def __init__(
        self, repo: str, *, kind: Literal["model", "dataset"], revision: str, endpoint: str | None, cache: Path
    ) -> None:
        from huggingface_hub import constants

        self.repo, self.kind, self.revision = repo, kind, revision
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        name = f"{kind}s--{repo.replace('/', '--')}"
        self.folder = cache / "hub" / name
        self._client_cache = Path(constants.HF_HUB_CACHE) / name
        self.error: type[DapoError] = WeightsError if kind == "model" else DataError

    def resolve(self) -> str:
        """The commit the revision stands for: asked of the hub, or as last known where the hub cannot be reached."""
        if _is_commit(self.revision):
            return self.revision
        remembered = self.folder / "refs" / quote(self.revision, safe="")
        if not _offline():
            try:
                return self._ask(self.revision)
            except _Unreachable as error:
                reason = str(error)
        else:
            reason = "HF_HUB_OFFLINE is set"
        for ref in (remembered, self._client_cache / "refs" / self.revision):
            if ref.is_file():
                commit = ref.read_text().strip()
                log.warning("%s: %s; going on with commit %s of %s", self.repo, reason, commit[:12], ref)
                return commit
        raise self.error(
            f"{self.kind} {self.repo} at revision {self.revision!r}: {reason}, and no earlier download of it is in "
            f"{self.folder.parent} or {self._client_cache.parent}; connect once, or give a local folder"
        )

    def files(self, commit: str) -> list[HubFile]:
        """All files of a commit."""
        listing = self.folder / f"{commit}.files.json"
        reason = "HF_HUB_OFFLINE is set"
        if not listing.is_file() and not _offline():
            try:
                self._ask(commit)
            except _Unreachable as error:
                reason = str(error)
        if listing.is_file():
            return [HubFile(**entry) for entry in json.loads(listing.read_text())]
        if local := list(self._files_of_client(commit)):
            return local
        raise self.error(
            f"{self.kind} {self.repo} at commit {commit[:12]}: {reason}, and it is not in {self.folder.parent} or "
            f"{self._client_cache.parent}; connect once, or give a local folder"
        )

    def snapshot(
        self,
        commit: str,
        files: Sequence[HubFile],
        *,
        inspect: Callable[[Path], None] = lambda folder: None,
        progress: Progress = quiet,
    ) -> Path:
        """The given files of a commit in one folder, complete and verified, with a manifest.json; downloads what is
        missing, once even if several processes ask.

        Args:
            inspect: looks at the folder when the small files are there, before the large ones are fetched; may raise.
        """
        target, partial_folder = self.folder / commit, self.folder / f"{commit}.partial"
        with exclusive(self.folder / f"{commit}.lock", f"downloading {self.repo}"):
            if _is_complete(target, files):
                log.info("%s at commit %s is in %s already", self.repo, commit[:12], target)
                return target
            if target.exists() and not partial_folder.exists():
                os.replace(target, partial_folder)  # something was deleted or more is wanted now: keep the rest
            with room_on(partial_folder, f"{self.kind} {self.repo}", self.error):
                self._import_from_client(commit, files, partial_folder)
                self._refuse_offline(commit, files, partial_folder)
                # What is inspected first is what is small: configuration, index, tokenizer.
                small = [f for f in files if f.size < _SMALL_BYTES]
                self._transfer(commit).run(small, partial_folder, quiet)
                inspect(partial_folder)
                self._transfer(commit).run(files, partial_folder, progress)
                manifest = {
                    "repo": self.repo,
                    "kind": self.kind,
                    "endpoint": self.endpoint,
                    "revision": self.revision,
                    "commit": commit,
                    "files": [asdict(f) for f in sorted(files, key=lambda f: f.path)],
                }
                (partial_folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial_folder, target)
        return target

    # asking

    def _ask(self, revision: str) -> str:
        """Asks for commit and files, and remembers both."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint)
        ask = partial(
            api.repo_info, self.repo, repo_type=self.kind, revision=revision, files_metadata=True, timeout=_REQUEST_S
        )
        info: Any = self._with_retries(ask)
        commit = str(info.sha)
        entries = [
            HubFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None, s.blob_id) for s in info.siblings or []
        ]
        for entry in entries:
            if not _stays_inside(entry.path):
                raise self.error(f"{self.kind} {self.repo} lists a file outside of itself: {entry.path!r}; not fetched")
        with room_on(self.folder, f"the file list of {self.repo}", self.error):
            write_whole(self.folder / f"{commit}.files.json", json.dumps([asdict(e) for e in entries]))
            if revision != commit:
                write_whole(self.folder / "refs" / quote(revision, safe=""), commit)
        return commit

    def _with_retries(self, request: Callable[[], _T]) -> _T:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                pause(attempt, f"{self.repo}: {reason}", threading.Event())
            try:
                return request()
            except HfHubHTTPError as error:
                reason = self._reason(error)
            except HFValidationError as error:
                raise self.error(f"{self.kind} repository {self.repo!r}: {error}; it is written org/name") from None
            except Exception as error:
                if not is_transport(error):
                    raise
                reason = f"{self.endpoint} cannot be reached ({short(error)})"
        raise _Unreachable(f"{reason}, {ATTEMPTS} attempts")

    def _reason(self, error: Any) -> str:
        """Why a request failed, where it may succeed later; raises where it will not."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        if isinstance(error, GatedRepoError):
            raise self.error(
                f"{self.kind} {self.repo} is gated: accept its terms at {self.endpoint} and set HF_TOKEN"
            ) from None
        if isinstance(error, RepositoryNotFoundError):
            raise self.error(
                f"{self.endpoint} has no {self.kind} {self.repo!r} (or it is private: set HF_TOKEN); check the name"
            ) from None
        if isinstance(error, RevisionNotFoundError):
            raise self.error(f"{self.kind} {self.repo} has no branch, tag or commit {self.revision!r}") from None
        status = error.response.status_code
        if status < 500 and status not in (408, 429):
            raise self.error(f"{self.endpoint} refuses {self.kind} {self.repo}: {short(error)}") from None
        return f"{self.endpoint} answers {status}"

    # fetching

    def _transfer(self, commit: str) -> Transfer:
        from huggingface_hub import hf_hub_url

        url = partial(hf_hub_url, self.repo, repo_type=self.kind, revision=commit, endpoint=self.endpoint)
        return Transfer(f"{self.kind} {self.repo}", url, self._reason, self.error)

    def _refuse_offline(self, commit: str, files: Sequence[HubFile], folder: Path) -> None:
        missing = [f.path for f in files if not (folder / f.path).exists()]
        if missing and _offline():
            raise self.error(
                f"{self.kind} {self.repo} at commit {commit[:12]}: HF_HUB_OFFLINE is set and {len(missing)} files are "
                f"not on this machine (first: {missing[0]}); connect once, or give a local folder"
            )

    # what the hub's own client has on this machine

    def _files_of_client(self, commit: str) -> Iterable[HubFile]:
        """Files of a commit in the client's cache; their checksums are the names of the blobs they point to."""
        snapshot = self._client_cache / "snapshots" / commit
        for path in sorted(snapshot.rglob("*")):
            if not path.is_file():
                continue
            digest = Path(os.readlink(path)).name if path.is_symlink() else ""
            large = digest if len(digest) == 64 else None
            blob = digest if len(digest) == 40 else None
            if large or blob:
                yield HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, large, blob)

    def _import_from_client(self, commit: str, files: Sequence[HubFile], folder: Path) -> None:
        """Takes what the client's cache holds, by hard link where both are on one disk."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            source, target = self._client_cache / "snapshots" / commit / file.path, folder / file.path
            if target.exists() or not source.is_file() or not file.is_content_of(source):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.resolve(), target)
            except OSError:
                temporary = target.with_name(f"{target.name}.part")
                shutil.copyfile(source, temporary)
                os.replace(temporary, target)


class _Unreachable(Exception):
    """The hub does not answer; what is known from earlier may do."""


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and _HEX.issuperset(revision)


def _is_complete(folder: Path, files: Sequence[HubFile]) -> bool:
    if not (folder / "manifest.json").is_file():
        return False
    return all((folder / f.path).is_file() and (folder / f.path).stat().st_size == f.size for f in files)


def _stays_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\\" not in path
