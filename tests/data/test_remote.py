"""Folders at URLs: data and weights are read from them, once; what is wrong is one sentence."""

import pytest

from dapo.config.data import DataConfig
from dapo.config.model import FolderModel
from dapo.data import remote, retry
from dapo.data.fetch import fetch_weights, weights_key
from dapo.data.prepare import data_key, prepare, read_manifest
from dapo.data.remote import RemoteFolder, fetch_folder, probe
from dapo.errors import DataError, EnvironmentCheckError, WeightsError
from tests.data.rows import hub_files, write_files
from tests.data.test_fetch import SHARDED
from tests.storages import S3, s3_folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)


def upload(folder, url):
    place = RemoteFolder(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place.put(path, str(path.relative_to(folder)))
    return place


def test_data_at_a_url_is_prepared_like_a_local_folder(storage, tmp_path):
    local = write_files(tmp_path / "figures", hub_files())
    upload(local, f"{storage}/figures")
    here = DataConfig(source={"kind": "folder", "path": str(local)}, cache_dir=str(tmp_path / "a"))
    there = DataConfig(source={"kind": "folder", "path": f"{storage}/figures"}, cache_dir=str(tmp_path / "b"))
    one, two = prepare(here, tmp_path / "a"), prepare(there, tmp_path / "b")
    assert (one / "train.parquet").read_bytes() == (two / "train.parquet").read_bytes()
    assert read_manifest(one)["splits"] == read_manifest(two)["splits"]
    assert two.name == data_key(there)


def test_another_content_at_the_url_is_another_key(storage, tmp_path):
    local = write_files(tmp_path / "figures", hub_files())
    place = upload(local, f"{storage}/figures")
    config = DataConfig(source={"kind": "folder", "path": f"{storage}/figures"}, cache_dir=str(tmp_path))
    before = data_key(config)
    assert data_key(config) == before
    more = tmp_path / "README.md"
    more.write_text("changed")
    place.put(more, "README.md")
    assert data_key(config) != before


def test_weights_at_a_url_are_fetched_once_and_verified(storage, tmp_path):
    local = write_files(tmp_path / "model", SHARDED)
    place = upload(local, f"{storage}/model")
    source = FolderModel(path=f"{storage}/model")
    key = weights_key(source, tmp_path)
    folder = fetch_weights(source, tmp_path / "cache")
    assert {p.name for p in folder.iterdir()} == {p.name for p in local.iterdir()}
    assert folder.name == key
    assert fetch_weights(source, tmp_path / "cache") == folder
    place.remove("config.json")
    with pytest.raises(WeightsError, match=r"no config\.json"):
        fetch_weights(source, tmp_path / "cache")


def test_nothing_there_is_one_sentence(storage, tmp_path):
    with pytest.raises(DataError, match=r"data\.source\.path=.*/nothing is empty, or not there"):
        fetch_folder(f"{storage}/nothing", tmp_path, "data.source.path", DataError)
    with pytest.raises(EnvironmentCheckError, match="is empty, or not there"):
        probe(f"{storage}/nothing", write=False)


def test_a_place_that_can_be_written_is_found_so_and_left_as_it_was(storage):
    assert probe(storage, write=True) == "an object was written, read and removed"
    assert RemoteFolder(storage).names() == []


def test_a_download_that_breaks_off_is_no_folder(storage, tmp_path, monkeypatch):
    upload(write_files(tmp_path / "model", SHARDED), f"{storage}/model")
    whole, get = [], RemoteFolder.get

    def break_off(self, name, file):
        if len(whole) == 1:
            raise ConnectionError("reset by peer")
        whole.append(name)
        get(self, name, file)

    with monkeypatch.context() as patched:
        patched.setattr(RemoteFolder, "get", break_off)
        with pytest.raises(WeightsError, match=r"cannot be downloaded \(ConnectionError: reset by peer\)"):
            fetch_folder(f"{storage}/model", tmp_path / "cache", "model.source.path", WeightsError)
    assert not [p for p in (tmp_path / "cache" / "remote").iterdir() if p.is_dir()]
    assert fetch_folder(f"{storage}/model", tmp_path / "cache", "model.source.path", WeightsError).is_dir()


def test_an_unknown_protocol_and_a_missing_driver_say_what_to_do():
    with pytest.raises(EnvironmentCheckError, match="nonsense"):
        RemoteFolder("nonsense://place")
    with pytest.raises(EnvironmentCheckError, match=r"pip install gcsfs=="):
        RemoteFolder("gs://bucket/place")


@S3
def test_missing_and_wrong_credentials_and_an_unreachable_server_are_told_in_time(s3_server, monkeypatch, tmp_path):
    import s3fs

    url = s3_folder(s3_server, monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(EnvironmentCheckError, match=r"cannot be written .*[Cc]redentials"):
        probe(url, write=True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(remote, "PROBE_S", 8.0)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(EnvironmentCheckError, match=r"does not answer within 8 s|cannot be written"):
        probe(url, write=True)


@S3
def test_a_misspelt_bucket_is_told_and_not_made(s3_server, monkeypatch):
    import s3fs

    s3_folder(s3_server, monkeypatch)
    with pytest.raises(EnvironmentCheckError, match="cannot be written"):
        probe("s3://bukcet/runs", write=True)
    assert s3fs.S3FileSystem().ls("") == ["bucket"]
