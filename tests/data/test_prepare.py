"""Preparation: rows of every source become the recipe's parquet, once, whatever is on the way."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from dapo.config.data import DataConfig, HubData, SyntheticData
from dapo.data.images import decode_image
from dapo.data.prepare import data_key, prepare, read_manifest
from dapo.data.storage import sha256_of
from tests.data.folders import image_bytes
from tests.data.hub_server import Fault, Hub
from tests.data.rows import as_parquet, folder_config, hub_files, read_split, write_files

NAME = "hiyouga/geometry3k"


def hub_config(hub: Hub, **settings: Any) -> DataConfig:
    return DataConfig(source=HubData(repo=NAME, endpoint=hub.endpoint), **settings)


def test_rows_have_the_columns_of_the_recipe(tmp_path: Path) -> None:
    config = folder_config(write_files(tmp_path / "source", hub_files()), instruction="Think.")
    folder = prepare(config, tmp_path / "cache")
    row = read_split(folder, "train")[3]
    assert row == {
        "data_source": "source",
        "prompt": [{"role": "user", "content": "<image>Find x if y = 3. Think."}],
        "images": [{"bytes": image_bytes(43, 50, number=3), "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "9"},
        "extra_info": {"split": "train", "index": 3, "answer": "9", "question": "<image>Find x if y = 3."},
        "tags": [],
    }
    assert [len(read_split(folder, split)) for split in ("train", "validation", "test")] == [20, 4, 6]


def test_datasets_library_reads_a_prepared_file_with_its_images(tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = prepare(folder_config(write_files(tmp_path / "source", hub_files())), tmp_path / "cache")
    rows = load_dataset("parquet", data_files=str(folder / "test.parquet"), streaming=True, split="train")
    assert isinstance(next(iter(rows))["images"][0], Image.Image)


def test_manifest_names_source_counts_and_checksums(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add("datasets", NAME, hub_files())
    folder = prepare(hub_config(hub), tmp_path)
    manifest = read_manifest(folder)
    assert manifest["source"]["identity"] == {"kind": "hub", "repo": NAME, "commit": repo.commit}
    assert manifest["source"]["revision"] == "main"
    assert {s: (c["rows"], c["quarantined"]) for s, c in manifest["splits"].items()} == {
        "train": (20, 0),
        "validation": (4, 0),
        "test": (6, 0),
    }
    for split, count in manifest["splits"].items():
        assert count["sha256"] == sha256_of(folder / f"{split}.parquet")
    assert folder == tmp_path / "data" / data_key(hub_config(hub), tmp_path)


def test_hub_and_its_copy_in_a_folder_give_the_same_rows(hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets", NAME, hub_files())
    hub.faults = [Fault("/cdn/*", status=503), Fault("/cdn/*", corrupt=True), Fault("/api/*", status=429)]
    fetched = prepare(hub_config(hub), tmp_path / "cache")
    copied = prepare(folder_config(write_files(tmp_path / "source", hub_files())), tmp_path / "cache")
    for split in ("train", "validation", "test"):
        other = [row | {"data_source": NAME} for row in read_split(copied, split)]
        assert read_split(fetched, split) == other


def test_only_parquet_files_and_the_card_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets", NAME, hub_files() | {"model.safetensors": b"x" * 100, "load.py": b"raise SystemExit"})
    prepare(hub_config(hub), tmp_path)
    asked = {request.path.rsplit("/", 1)[1] for request in hub.requests if "/resolve/" in request.path}
    assert asked == {Path(name).name for name in hub_files() if name != ".gitattributes"}


def test_second_preparation_changes_nothing_and_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets", NAME, hub_files())
    folder = prepare(hub_config(hub), tmp_path)
    written, sent = (folder / "manifest.json").stat().st_mtime_ns, hub.bytes_sent("/cdn/*")
    assert prepare(hub_config(hub), tmp_path) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    assert hub.bytes_sent("/cdn/*") == sent


def test_damaged_prepared_file_is_made_again(tmp_path: Path) -> None:
    config = folder_config(write_files(tmp_path / "source", hub_files()))
    folder = prepare(config, tmp_path)
    good = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(good[:-1] + b"x")
    assert prepare(config, tmp_path) == folder
    assert (folder / "train.parquet").read_bytes() == good


def test_key_changes_with_content_and_instruction_and_not_with_place(tmp_path: Path) -> None:
    first = write_files(tmp_path / "a" / "set", hub_files())
    same = write_files(tmp_path / "b" / "set", hub_files())
    other = write_files(tmp_path / "c" / "set", hub_files(train=21))
    key = data_key(folder_config(first))
    assert data_key(folder_config(same)) == key
    assert data_key(folder_config(other)) != key
    assert data_key(folder_config(first, instruction="Think.")) != key
    assert data_key(folder_config(first, max_prompt_tokens=7)) == key


def test_key_of_a_branch_changes_when_the_branch_moves(hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets", NAME, hub_files())
    before = data_key(hub_config(hub), tmp_path)
    hub.add("datasets", NAME, hub_files(train=21))
    assert data_key(hub_config(hub), tmp_path) != before


def test_synthetic_rows_are_prepared_like_any_other(tmp_path: Path) -> None:
    config = DataConfig(source=SyntheticData(train=12, validation=3, test=5))
    folder = prepare(config, tmp_path)
    rows = read_split(folder, "train")
    assert len(rows) == 12
    assert all(row["reward_model"]["ground_truth"] and row["tags"] for row in rows)
    assert decode_image(rows[0]["images"][0]["bytes"]).size == (32, 32)


def test_images_by_path_are_read_from_the_folder(tmp_path: Path) -> None:
    row = {"images": [{"bytes": None, "path": "pictures/one.png"}], "problem": "<image>x?", "answer": "1"}
    files = {"train.parquet": as_parquet([row]), "test.parquet": as_parquet([row]), "pictures/one.png": image_bytes()}
    folder = prepare(folder_config(write_files(tmp_path / "source", files)), tmp_path / "cache")
    assert read_split(folder, "train")[0]["images"][0]["bytes"] == image_bytes()


def test_rows_without_images_are_questions_in_text(tmp_path: Path) -> None:
    files = {name: as_parquet([{"images": [], "problem": "2+2?", "answer": "4"}]) for name in ("a.parquet",)}
    files = {"train.parquet": files["a.parquet"], "test.parquet": files["a.parquet"]}
    folder = prepare(folder_config(write_files(tmp_path / "source", files), instruction=""), tmp_path / "cache")
    assert read_split(folder, "train")[0]["prompt"][0]["content"] == "2+2?"


def test_full_disk_is_one_sentence_and_nothing_half_written_stays(tmp_path: Path) -> None:
    code = (
        "import resource, sys, pathlib\n"
        "from dapo.config.data import DataConfig, SyntheticData\n"
        "from dapo.data.prepare import prepare\n"
        "from dapo.errors import DataError\n"
        # The kernel refuses to let a file grow further: for the writer the same as a disk that is full.
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    prepare(DataConfig(source=SyntheticData(train=500, validation=1, test=1)), pathlib.Path(sys.argv[1]))\n"
        "except DataError as error:\n"
        "    sys.stdout.write(str(error))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "no room left while writing prepared data" in out.stdout
    assert "set data.cache_dir to a larger disk" in out.stdout
    assert "\n" not in out.stdout
    assert [path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"] == []


def test_folder_left_by_a_killed_preparation_is_removed(tmp_path: Path) -> None:
    config = DataConfig(source=SyntheticData(train=5, validation=1, test=1))
    stale = tmp_path / "data" / f".{data_key(config, tmp_path)}.0123abcd"
    stale.mkdir(parents=True)
    (stale / "train.parquet").write_bytes(b"half")
    prepare(config, tmp_path)
    assert not stale.exists()


def test_progress_counts_rows_up_to_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    config = DataConfig(source=SyntheticData(train=300, validation=20, test=20))
    prepare(config, tmp_path, lambda *call: calls.append(call))
    assert calls[-1] == (340, 340, "rows")
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)


def test_prepared_folder_contacts_nobody(tmp_path: Path, hub: Hub) -> None:
    code = (
        "import sys, pathlib\n"
        "from dapo.config.data import DataConfig, FolderData\n"
        "from dapo.data.prepare import prepare\n"
        "prepare(DataConfig(source=FolderData(path=sys.argv[1])), pathlib.Path(sys.argv[2]))\n"
    )
    source = write_files(tmp_path / "source", hub_files())
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "cache")], env=env, timeout=60, check=True)
    assert hub.requests == []


def test_naming_the_data_loads_neither_torch_nor_transformers() -> None:
    # The flow's process asks for the key; it must stay light.
    code = (
        "import sys; from dapo.config.data import DataConfig; from dapo.data.prepare import data_key\n"
        "data_key(DataConfig())\n"
        "sys.stdout.write(' '.join({'torch', 'transformers', 'datasets'} & {*sys.modules}))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout == ""
