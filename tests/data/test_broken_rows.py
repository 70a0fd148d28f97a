"""Broken rows are set aside with a reason; too many, or a folder that cannot be used, are one clear error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dapo.data.prepare import data_key, prepare, read_manifest
from dapo.errors import DataError
from tests.data.folders import image_bytes
from tests.data.rows import Rows, as_parquet, folder_config, geometry_rows, hub_files, read_split, write_files


def with_broken(tmp_path: Path, broken: Rows, good: int = 20) -> Path:
    files = hub_files() | {"data/train-00000-of-00001.parquet": as_parquet(geometry_rows(good) + broken)}
    return write_files(tmp_path / "source", files)


def good_image() -> dict[str, Any]:
    return {"bytes": image_bytes(), "path": None}


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"images": [good_image()], "problem": "<image>x?", "answer": None}, "no answer"),
    ({"images": [good_image()], "problem": "<image>x?", "answer": " "}, "no answer"),
    ({"images": [good_image()], "problem": None, "answer": "1"}, "no problem"),
    ({"images": None, "problem": "<image>x?", "answer": "1"}, "images is NoneType, not a list"),
    ({"images": [None], "problem": "<image>x?", "answer": "1"}, "an image is NoneType, not bytes"),
    ({"images": [{"bytes": None, "path": None}], "problem": "<image>x?", "answer": "1"}, "neither bytes nor path"),
    ({"images": [{"bytes": b"GIF", "path": None}], "problem": "<image>x?", "answer": "1"}, "not a readable image"),
    ({"images": [{"bytes": image_bytes()[:-30], "path": None}], "problem": "x?", "answer": "1"}, "damaged PNG image"),
    ({"images": [{"bytes": None, "path": "/etc/hostname"}], "problem": "x?", "answer": "1"}, "out of the data set's"),
    ({"images": [{"bytes": None, "path": "gone.png"}], "problem": "x?", "answer": "1"}, "cannot be read"),
    ({"images": [], "problem": "<image>x?", "answer": "1"}, "1 <image> markers for 0 images"),
    ({"images": [good_image()], "problem": "<|image_pad|>x?", "answer": "1"}, "model's control token"),
]


def test_every_kind_of_broken_row_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    source = with_broken(tmp_path, [row for row, _ in BROKEN])
    folder = prepare(folder_config(source, max_broken_share=0.5), tmp_path / "cache")
    entries = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(e["split"], e["index"]) for e in entries] == [("train", 20 + i) for i in range(len(BROKEN))]
    for entry, (_, reason) in zip(entries, BROKEN, strict=True):
        assert reason in entry["reason"]
    assert read_manifest(folder)["splits"]["train"]["quarantined"] == len(BROKEN)
    assert [row["extra_info"]["index"] for row in read_split(folder, "train")] == list(range(20))


def test_more_broken_rows_than_allowed_stop_the_stage_and_keep_the_reasons(tmp_path: Path) -> None:
    broken = [row for row, _ in BROKEN[:2]]
    config = folder_config(with_broken(tmp_path, broken), max_broken_share=0.05)
    with pytest.raises(
        DataError, match=r"2 of 32 rows are broken \(6\.2%; .*allows 5\.0%\): 2 x no answer\."
    ) as failed:
        prepare(config, tmp_path / "cache")
    reasons = Path(str(failed.value).rsplit(": ", 1)[1])
    assert len(reasons.read_text().splitlines()) == 2
    assert [p.name for p in (tmp_path / "cache" / "data").iterdir() if p.is_dir() and p.name != ".datasets"] == []


def test_answers_that_are_numbers_are_refused_and_not_guessed(tmp_path: Path) -> None:
    import io

    import pyarrow as pa

    rows = [row | {"answer": i} for i, row in enumerate(geometry_rows(5))]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    source = write_files(tmp_path / "source", {"train.parquet": out.getvalue(), "test.parquet": out.getvalue()})
    with pytest.raises(DataError, match="10 x answer is int, not text"):
        prepare(folder_config(source), tmp_path / "cache")


def without(*names: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda files: {name: data for name, data in files.items() if not any(part in name for part in names)}


def columns_renamed(files: dict[str, bytes]) -> dict[str, bytes]:
    import io

    import pyarrow as pa

    out = io.BytesIO()
    pq.write_table(pa.table({"question": ["x?"], "solution": ["1"]}), out)
    return {"train.parquet": out.getvalue(), "test.parquet": out.getvalue()}


def cut_off(files: dict[str, bytes]) -> dict[str, bytes]:
    name = "data/train-00000-of-00001.parquet"
    return files | {name: files[name][:-100]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("parquet"), "has no parquet files; it should hold one or more per split"),
        (
            without("test", "README"),
            r"no rows in split test, which the run needs; it has train \(20 rows\), validation \(4 rows\)",
        ),
        (without("train", "README"), "no rows in split train"),
        (columns_renamed, "has no column images and problem and answer; it has question, solution"),
        (cut_off, "cannot be opened"),
    ],
)
def test_unusable_folders_are_explained(
    tmp_path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(folder_config(write_files(tmp_path / "source", change(hub_files()))), tmp_path / "cache")


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source\.path=.*/nowhere is not a folder"):
        data_key(folder_config(tmp_path / "nowhere"))
