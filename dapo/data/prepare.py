"""Preparation: rows of a source, checked one by one, written once as parquet that holds everything.

Layout of ``<cache>/data/<key>/``: {train,validation,test}.parquet, quarantine.jsonl (broken rows with the reason) and
manifest.json, which is written last. The key names content and code, so that a folder that exists need not be made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from dapo.config.data import DataConfig
from dapo.data.images import IMAGE_MARKER, encode_png, normalise_image
from dapo.data.sources import SPLITS, Opened, Row, identify, name_of, open_source
from dapo.data.storage import Progress, exclusive, quiet, room_on, sha256_of, written_whole
from dapo.errors import DataError

log = logging.getLogger(__name__)

_CODE = ("images.py", "prepare.py", "sources.py")
_ROWS_AT_ONCE = 128
_CONTROL_TOKEN = re.compile(r"<\|\w+\|>")


@dataclass(frozen=True, slots=True)
class SplitCount:
    """What became of a split's rows."""

    rows: int
    quarantined: int
    images: int
    bytes: int
    sha256: str
    """Of the parquet file."""


def data_key(config: DataConfig, cache: Path | None = None) -> str:
    """16 hex digits of the source's content, of the settings that change the rows, and of the code that makes them.

    A hub is asked for the commit of its revision; a folder's files are hashed.

    Args:
        cache: None: `config.cache_dir`.

    Raises:
        DataError: the source is not there.
    """
    return _key(config, identify(config.source, cache or Path(config.cache_dir)))


def prepare(config: DataConfig, out_root: Path, progress: Progress = quiet) -> Path:
    """Prepared data in ``out_root/data/<key>``; what is there already and whole is used as it is.

    Args:
        out_root: the cache folder, shared by all runs.
        progress: called with bytes while downloading, with rows while preparing.

    Raises:
        DataError: the source is unusable, more rows than `max_broken_share` are broken, a split that training needs is
            empty, or the disk is full. Nothing half-written stays, but the broken rows' reasons do.
    """
    identity = identify(config.source, out_root)
    key = _key(config, identity)
    target = out_root / "data" / key
    with exclusive(target.with_name(f"{key}.lock"), f"preparing data in {target}"):
        if is_whole(target):
            log.info("data %s is prepared already in %s", key, target)
        else:
            with room_on(target.parent, "prepared data", DataError):
                opened = open_source(config.source, identity, out_root, progress)
                with written_whole(target) as folder:
                    _write(config, identity, opened, folder, target, progress)
    return target


def is_whole(folder: Path) -> bool:
    """Whether a prepared folder has all files its manifest names, unchanged."""
    try:
        splits = read_manifest(folder)["splits"]
    except (OSError, ValueError, KeyError):
        return False
    for split, count in splits.items():
        path = folder / f"{split}.parquet"
        if not path.is_file() or sha256_of(path) != count["sha256"]:
            log.warning("%s is not as its manifest says; preparing it again", path)
            return False
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a prepared folder: key, source, splits, instruction, versions."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def _key(config: DataConfig, identity: Mapping[str, Any]) -> str:
    parts = {
        "source": identity,
        "name": name_of(config.source),
        "instruction": config.instruction,
        # A stricter limit must not find what a looser one let through, nor another split what this one lacks.
        "limits": [config.max_broken_share, config.validation_split],
        "code": [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in _CODE],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _write(
    config: DataConfig, identity: Mapping[str, Any], opened: Opened, folder: Path, target: Path, progress: Progress
) -> None:
    """Everything into `folder`, which will be called `target`."""
    reasons: Counter[str] = Counter()
    splits: dict[str, SplitCount] = {}
    done = 0

    def counted(rows: Iterable[Row]) -> Iterator[Row]:
        nonlocal done
        for row in rows:
            yield row
            done += 1
            if done % _ROWS_AT_ONCE == 0:
                progress(done, opened.total, "rows")

    quarantine = folder / "quarantine.jsonl"
    with quarantine.open("w") as broken:
        for split in SPLITS:
            if split in opened.splits:
                records = _Records(split, name_of(config.source), config.instruction, opened.root, broken, reasons)
                splits[split] = _write_split(records, counted(opened.splits[split]), folder / f"{split}.parquet")
    progress(done, opened.total, "rows")
    _refuse_broken(config, splits, reasons, quarantine, target.with_name(f"{target.name}.quarantine.jsonl"))
    _refuse_empty(config, splits)
    manifest = {
        "key": target.name,
        "source": config.source.model_dump() | {"identity": identity},
        "splits": {split: asdict(count) for split, count in splits.items()},
        "instruction": config.instruction,
        "versions": {name: version(name) for name in ("datasets", "pillow", "pyarrow")},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _write_split(records: _Records, rows: Iterable[Row], path: Path) -> SplitCount:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = prepared_schema()
    written = images = 0
    accepted = records.of(rows)
    with path.open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while batch := list(islice(accepted, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            written += len(batch)
            images += sum(len(record["images"]) for record in batch)
    return SplitCount(written, records.quarantined, images, path.stat().st_size, sha256_of(path))


def prepared_schema() -> Any:
    """Arrow schema of a prepared file; `datasets` decodes the images of it by itself."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    features = Features(
        {
            "data_source": text,
            "prompt": List({"role": text, "content": text}),
            "images": List(Image()),
            "ability": text,
            "reward_model": {"style": text, "ground_truth": text},
            "extra_info": {"split": text, "index": Value("int64"), "answer": text, "question": text},
            "tags": List(text),
        }
    )
    return features.arrow_schema


class _Records:
    """Turns a split's rows into records, and writes down why it does not."""

    def __init__(
        self, split: str, data_source: str, instruction: str, root: Path, broken: TextIO, reasons: Counter[str]
    ) -> None:
        self._split, self._data_source, self._instruction, self._root = split, data_source, instruction, root
        self._broken, self._reasons = broken, reasons
        self.quarantined = 0

    def of(self, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(rows):
            try:
                yield self._record(index, row)
            except DataError as error:
                self.quarantined += 1
                self._reasons[str(error)] += 1
                shown = {"split": self._split, "index": index, "reason": str(error)}
                self._broken.write(json.dumps(shown | {"question": str(row.get("problem"))[:200]}) + "\n")

    def _record(self, index: int, row: Row) -> dict[str, Any]:
        question, answer = _text(row, "problem"), _text(row, "answer")
        if found := _CONTROL_TOKEN.search(question):
            raise DataError(f"problem contains {found[0]}, which looks like a model's control token")
        listed = row.get("images")
        if not isinstance(listed, list | tuple):
            raise DataError(f"images is {type(listed).__name__}, not a list")
        images = [self._image(item) for item in listed]
        markers = question.count(IMAGE_MARKER)
        if markers not in (0, len(images)):
            raise DataError(f"problem has {markers} {IMAGE_MARKER} markers for {len(images)} images")
        content = question if markers else IMAGE_MARKER * len(images) + question
        content = f"{content} {self._instruction}" if self._instruction else content
        return {
            "data_source": self._data_source,
            "prompt": [{"role": "user", "content": content}],
            "images": [{"bytes": image, "path": None} for image in images],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": self._split, "index": index, "answer": answer, "question": question},
            "tags": [str(tag) for tag in row.get("tags") or ()],
        }

    def _image(self, item: Any) -> bytes:
        if isinstance(item, Image.Image):
            return encode_png(item)
        if isinstance(item, bytes):
            return normalise_image(item)
        if not isinstance(item, dict):
            raise DataError(f"an image is {type(item).__name__}, not bytes")
        if isinstance(data := item.get("bytes"), bytes):
            return normalise_image(data)
        if not isinstance(name := item.get("path"), str):
            raise DataError("an image has neither bytes nor path")
        path = (self._root / name).resolve()
        if not path.is_relative_to(self._root.resolve()):
            raise DataError("an image's path leads out of the data set's folder")
        try:
            return normalise_image(path.read_bytes())
        except OSError as error:
            raise DataError(f"an image's file cannot be read ({error.strerror})") from None


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise DataError(f"no {column}")
    if not isinstance(value, str):
        raise DataError(f"{column} is {type(value).__name__}, not text")
    if not value.strip():
        raise DataError(f"no {column}")
    return value


def _refuse_broken(
    config: DataConfig, splits: Mapping[str, SplitCount], reasons: Counter[str], quarantine: Path, kept: Path
) -> None:
    """The reasons are kept beside the folder that is not made."""
    broken = sum(count.quarantined for count in splits.values())
    total = broken + sum(count.rows for count in splits.values())
    if broken <= config.max_broken_share * total:
        if broken:
            log.warning("%d of %d rows are broken and left out; reasons are in quarantine.jsonl", broken, total)
        return
    quarantine.replace(kept)
    often = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    raise DataError(
        f"{broken} of {total} rows are broken ({broken / total:.1%}; data.max_broken_share allows "
        f"{config.max_broken_share:.1%}): {often}. Every row and reason: {kept}"
    )


def _refuse_empty(config: DataConfig, splits: Mapping[str, SplitCount]) -> None:
    for split in ("train", config.validation_split):
        if split not in splits or not splits[split].rows:
            there = ", ".join(f"{name} ({count.rows} rows)" for name, count in splits.items())
            raise DataError(
                f"the data set has no rows in split {split}, which the run needs; it has {there}"
                + ("; try another data.validation_split" if split != "train" else "")
            )
