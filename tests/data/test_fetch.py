"""Weights: whole or refused, fetched once, checked before anything large is downloaded."""

import json
import struct
from pathlib import Path

import pytest

from dapo.config.model import FolderModel, HubModel
from dapo.data.fetch import INDEX, fetch_weights, verify_weights, weights_key
from dapo.errors import WeightsError
from tests.data.hub_server import Fault, Hub
from tests.data.rows import write_files
from tests.model.tiny import make_folder

REPO = "Qwen/Qwen3-VL-Small"
CONFIG = json.dumps({"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"}).encode()


def safetensors(*names: str, size: int = 1000) -> bytes:
    """A file of uint8 tensors."""
    header = {
        name: {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(size * len(names))


SHARDS = {"model-00001-of-00002.safetensors": ("a", "b"), "model-00002-of-00002.safetensors": ("c",)}
INDEX_FILE = json.dumps({"weight_map": {tensor: name for name, tensors in SHARDS.items() for tensor in tensors}})
SHARDED = {"config.json": CONFIG, INDEX: INDEX_FILE.encode(), "tokenizer.json": b"{}"} | {
    name: safetensors(*tensors) for name, tensors in SHARDS.items()
}


def hub_model(hub: Hub, revision: str = "main") -> HubModel:
    return HubModel(repo=REPO, endpoint=hub.endpoint, revision=revision)


def folder_model(folder: Path) -> FolderModel:
    return FolderModel(path=str(folder))


def test_sharded_weights_arrive_whole_with_the_commit_they_are_of(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add("models", REPO, SHARDED)
    folder = fetch_weights(hub_model(hub), tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["repo"], manifest["commit"]) == (REPO, repo.commit)
    assert {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "manifest.json"} == SHARDED


def test_weights_are_fetched_through_every_kind_of_failure(hub: Hub, tmp_path: Path) -> None:
    hub.add("models", REPO, SHARDED)
    hub.faults = [
        Fault("/api/*", status=503),
        Fault("/cdn/*", break_after=100),
        Fault("/cdn/*", status=500),
        Fault("/cdn/*", corrupt=True),
    ]
    folder = fetch_weights(hub_model(hub), tmp_path)
    assert {name: (folder / name).read_bytes() for name in SHARDED} == SHARDED
    assert all(fault.times == 0 for fault in hub.faults)


def test_only_weights_tokenizer_and_configuration_are_fetched(hub: Hub, tmp_path: Path) -> None:
    extra = {"original/model.safetensors": b"x", "pytorch_model.bin": b"x", "modeling.py": b"x", "README.md": b"x"}
    hub.add("models", REPO, SHARDED | extra)
    folder = fetch_weights(hub_model(hub), tmp_path)
    assert {path.name for path in folder.rglob("*")} == {*SHARDED, "manifest.json"}


def test_second_run_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.add("models", REPO, SHARDED)
    folder = fetch_weights(hub_model(hub), tmp_path)
    sent = hub.bytes_sent("/cdn/*")
    assert fetch_weights(hub_model(hub), tmp_path) == folder
    assert hub.bytes_sent("/cdn/*") == sent


def test_file_deleted_from_the_cache_is_fetched_again_and_only_that(hub: Hub, tmp_path: Path) -> None:
    hub.add("models", REPO, SHARDED)
    folder = fetch_weights(hub_model(hub), tmp_path)
    sent = hub.bytes_sent("/cdn/*")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert fetch_weights(hub_model(hub), tmp_path) == folder
    assert hub.bytes_sent("/cdn/*") - sent == len(SHARDED["model-00002-of-00002.safetensors"])


@pytest.mark.parametrize("kind", ["dense", "moe", "text", "text-moe"])
def test_weights_of_every_architecture_that_is_trained_are_accepted(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, kind)
    assert fetch_weights(folder_model(folder), tmp_path / "cache") == folder


def test_unsupported_architecture_is_refused_before_the_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.add("models", REPO, SHARDED | {"config.json": b'{"architectures": ["LlamaForCausalLM"]}'})
    with pytest.raises(WeightsError, match="LlamaForCausalLM is not supported; supported: Qwen3VL"):
        fetch_weights(hub_model(hub), tmp_path)
    # The files are small enough here to come with the configuration; large ones are asked for after it.
    assert not any((tmp_path / "hub").rglob("manifest.json"))


def test_large_weights_of_an_unsupported_architecture_are_never_asked_for(hub: Hub, tmp_path: Path) -> None:
    large = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "model.safetensors": bytes(2 * 2**20)}
    hub.add("models", REPO, large)
    with pytest.raises(WeightsError, match="not supported"):
        fetch_weights(hub_model(hub), tmp_path)
    assert hub.bytes_sent("/cdn/*") == 0


def test_repository_that_lacks_a_shard_of_its_index_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("models", REPO, {name: data for name, data in SHARDED.items() if "00002-of" not in name})
    with pytest.raises(WeightsError, match=r"on the hub lacks 1 of the 2 files .*model-00002-of-00002\.safetensors"):
        fetch_weights(hub_model(hub), tmp_path)


def test_repository_without_safetensors_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("models", REPO, {"config.json": CONFIG, "pytorch_model.bin": b"x"})
    with pytest.raises(WeightsError, match="has no safetensors weights at its top level"):
        fetch_weights(hub_model(hub), tmp_path)


def test_disk_that_is_too_small_is_named_with_both_numbers(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add("models", REPO, SHARDED)
    repo.claimed_sizes["model-00001-of-00002.safetensors"] = 2**60
    with pytest.raises(
        WeightsError, match=r"needs 1073741824\.0 GiB more, .*\.partial has [0-9.]+ GiB free; .*cache_dir"
    ):
        fetch_weights(hub_model(hub), tmp_path)


def test_local_folder_is_used_in_place_and_left_as_it_is(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "model", SHARDED)
    assert fetch_weights(folder_model(folder), tmp_path / "cache") == folder
    assert {path.name for path in folder.iterdir()} == set(SHARDED)
    assert not (tmp_path / "cache").exists()


def test_single_file_needs_no_index(tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "model.safetensors": safetensors("a")}
    verify_weights(write_files(tmp_path / "model", files))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.json": None}, r"has no config\.json"),
        ({"config.json": b"{"}, r"config\.json cannot be read"),
        ({"config.json": b"[]"}, "does not hold a JSON object"),
        ({"config.json": b"{}"}, "architecture none is not supported"),
        ({INDEX: None}, r"has neither model\.safetensors nor"),
        ({INDEX: b"{}"}, "has no weight_map"),
        ({"model-00002-of-00002.safetensors": None}, r"lacks 1 of the 2 files .*00002-of-00002"),
        ({"model-00001-of-00002.safetensors": safetensors("a")}, r"lacks 1 tensors .*\(first: b\)"),
        ({"model-00001-of-00002.safetensors": safetensors("a", "b")[:-1]}, r"has \d+ bytes, its header says \d+"),
        ({"model-00001-of-00002.safetensors": b""}, "is not a safetensors file"),
        ({"model-00001-of-00002.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "is not a safetensors"),
        ({"model-00001-of-00002.safetensors": struct.pack("<Q", 4) + b"nope"}, "bad header"),
    ],
)
def test_partial_and_damaged_folders_are_refused(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    files = {name: data for name, data in (SHARDED | change).items() if data is not None}
    with pytest.raises(WeightsError, match=message):
        fetch_weights(folder_model(write_files(tmp_path / "model", files)), tmp_path / "cache")


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.source\.path=.*/nowhere is not a folder"):
        fetch_weights(folder_model(tmp_path / "nowhere"), tmp_path)


def test_key_follows_the_commit_and_the_folders_files(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add("models", REPO, SHARDED)
    main = weights_key(hub_model(hub), tmp_path)
    assert weights_key(hub_model(hub, revision=repo.commit), tmp_path) == main
    hub.add("models", REPO, SHARDED | {"config.json": CONFIG + b" "})
    assert weights_key(hub_model(hub), tmp_path) != main
    folder = write_files(tmp_path / "model", SHARDED)
    local = weights_key(folder_model(folder), tmp_path)
    (folder / "config.json").write_bytes(CONFIG + b" ")
    assert weights_key(folder_model(folder), tmp_path) != local
