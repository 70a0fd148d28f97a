"""Where rows come from: a hub repository, a folder in the hub's layout (local or at a URL), or figures we draw.

All give the columns of Geometry3K: images, problem, answer (and tags where there are any).
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo.config.data import DataSource, FolderData, HubData, SyntheticData
from dapo.data import synthetic
from dapo.data.hub import HubRepo
from dapo.data.remote import content_key, fetch_folder, is_url
from dapo.data.storage import Progress, sha256_of
from dapo.errors import DataError

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
COLUMNS = ("images", "problem", "answer")
SPLITS = ("train", "validation", "test")
_KEY = "data.source.path"


@dataclass(frozen=True, slots=True)
class Opened:
    """A source ready to be read."""

    splits: Mapping[str, Iterable[Row]]
    total: int
    """Rows of all splits, for progress."""
    root: Path
    """Folder that images given by path are relative to; none may lie outside."""


def identify(source: DataSource, cache: Path) -> dict[str, Any]:
    """What decides the source's content, as JSON: the commit, the files' checksums, or settings and code.

    Raises:
        DataError: the repository or folder is not there.
    """
    match source:
        case HubData():
            return {"kind": "hub", "repo": source.repo, "commit": _repo(source, cache).resolve()}
        case FolderData() if is_url(source.path):
            return {"kind": "url", "content": content_key(source.path, _KEY, DataError)}
        case FolderData():
            root = _folder(source)
            files = {path.relative_to(root).as_posix(): sha256_of(path) for path in _parquet_files(root)}
            card = root / "README.md"  # may say which file is which split
            return {"kind": "folder", "files": files | ({card.name: sha256_of(card)} if card.is_file() else {})}
        case SyntheticData():
            code = hashlib.sha256(inspect.getsource(synthetic).encode()).hexdigest()
            return source.model_dump() | {"code": code}


def name_of(source: DataSource) -> str:
    """The `data_source` of its rows."""
    match source:
        case HubData():
            return source.repo
        case FolderData():
            return source.path.rstrip("/").rpartition("/")[2] if is_url(source.path) else _folder(source).name
        case SyntheticData():
            return "synthetic"


def open_source(source: DataSource, identity: Mapping[str, Any], cache: Path, progress: Progress) -> Opened:
    """Makes the rows available on this machine, downloading them where they are on a hub.

    Args:
        identity: of `identify`: the content that was named is the content that is read.

    Raises:
        DataError: it cannot be fetched, has no parquet files, or lacks columns.
    """
    match source:
        case HubData():
            repo, commit = _repo(source, cache), identity["commit"]
            files = [f for f in repo.files(commit) if f.path.endswith(".parquet") or f.path == "README.md"]
            if not any(f.path.endswith(".parquet") for f in files):
                raise DataError(f"data set {source.repo} at commit {commit[:12]} has no parquet files")
            return _open_folder(repo.snapshot(commit, files, progress=progress), source.repo, cache)
        case FolderData():
            url = is_url(source.path)
            root = fetch_folder(source.path, cache, _KEY, DataError, progress) if url else _folder(source)
            return _open_folder(root, source.path, cache)
        case SyntheticData():
            counts = {split: getattr(source, split) for split in SPLITS}
            drawn = {split: synthetic.rows(split, count, source.seed) for split, count in counts.items()}
            return Opened(drawn, sum(counts.values()), cache)


def _repo(source: HubData, cache: Path) -> HubRepo:
    return HubRepo(source.repo, kind="dataset", revision=source.revision, endpoint=source.endpoint, cache=cache)


def _folder(source: FolderData) -> Path:
    root = Path(source.path).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"data.source.path={source.path} is not a folder")
    return root


def _parquet_files(root: Path) -> list[Path]:
    found = sorted(root.rglob("*.parquet"))
    if not found:
        raise DataError(
            f"data.source.path={root} has no parquet files; it should hold one or more per split, for example "
            "train.parquet or data/train-00000-of-00001.parquet"
        )
    return found


def _open_folder(root: Path, name: str, cache: Path) -> Opened:
    import datasets
    import pyarrow.parquet as pq

    settings = datasets.DownloadConfig(local_files_only=True)
    try:
        total = sum(pq.read_metadata(path).num_rows for path in _parquet_files(root))
        # Streaming reads the parquet files as they are; otherwise the library writes a second copy of all images.
        loaded = datasets.load_dataset(
            str(root), streaming=True, cache_dir=str(cache / "data" / ".datasets"), download_config=settings
        )
        # Without decoding, an image that cannot be read is a broken row and not the end of the whole split.
        found = {split: loaded[split].decode(False) for split in SPLITS if split in loaded}
    except DataError:
        raise
    except Exception as error:  # the library raises its own, pyarrow's and Python's errors here
        raise DataError(f"data set {name} cannot be opened: {type(error).__name__}: {error}") from None
    if not found:
        raise DataError(f"data set {name} has the splits {', '.join(map(str, loaded))}; needed: {', '.join(SPLITS)}")
    for split, rows in found.items():
        columns = list(rows.features or {})
        missing = [column for column in COLUMNS if column not in columns]
        if missing:
            raise DataError(
                f"data set {name}, split {split}, has no column {' and '.join(missing)}; it has {', '.join(columns)}, "
                f"and {', '.join(COLUMNS)} are needed"
            )
    return Opened({split: _readable(rows, name, split) for split, rows in found.items()}, total, root)


def _readable(rows: Iterable[Row], name: str, split: str) -> Iterator[Row]:
    try:
        yield from rows
    except Exception as error:  # pyarrow and the library raise many kinds for a damaged file
        raise DataError(f"data set {name}, split {split}, cannot be read: {type(error).__name__}: {error}") from None
