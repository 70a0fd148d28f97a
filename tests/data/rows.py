"""Data sets in the hub's layout, made for tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

from dapo.config.data import DataConfig, FolderData
from tests.data.folders import image_bytes

Rows = list[dict[str, Any]]


CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
  - {split: test, path: data/test-*}
---
"""


def geometry_rows(count: int, start: int = 0) -> Rows:
    """Rows as Geometry3K has them."""
    return [
        {
            "images": [{"bytes": image_bytes(40 + i % 7, 50, number=i), "path": None}],
            "problem": f"<image>Find x if y = {i}.",
            "answer": str(i * 3),
        }
        for i in range(start, start + count)
    ]


def as_parquet(rows: Rows) -> bytes:
    """A file as the hub stores it: images as bytes, the features in its metadata."""
    features = Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")})
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), out)
    return out.getvalue()


def hub_files(train: int = 20, validation: int = 4, test: int = 6) -> dict[str, bytes]:
    """A repository laid out as hiyouga/geometry3k."""
    return {
        "README.md": CARD,
        ".gitattributes": b"*.parquet filter=lfs\n",
        "data/train-00000-of-00001.parquet": as_parquet(geometry_rows(train)),
        "data/validation-00000-of-00001.parquet": as_parquet(geometry_rows(validation, 1000)),
        "data/test-00000-of-00001.parquet": as_parquet(geometry_rows(test, 2000)),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def folder_config(folder: Path, **settings: Any) -> DataConfig:
    return DataConfig(source=FolderData(path=str(folder)), **settings)


def read_split(folder: Path, split: str) -> Rows:
    return pq.read_table(folder / f"{split}.parquet").to_pylist()
