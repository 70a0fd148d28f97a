"""Checkpoints in object storage: whole or not there, found by a machine with an empty disk, pruned as here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dapo.data import retry
from dapo.data.remote import RemoteFolder
from dapo.errors import CheckpointError, ConfigError
from dapo.observe.journal import Journal, read
from dapo.observe.run_folder import REGISTERED, RunFolder
from dapo.runtime import checkpoints
from dapo.runtime.mirror import Mirror, require_unused, restore_records
from tests.runtime.fakes import kinds, make
from tests.storages import S3, s3_folder, s3_variables


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)


def folder_of(place: Path) -> RunFolder:
    folder = RunFolder(place / "run-1234")
    folder.root.mkdir(parents=True)
    return folder


def save(folder, step, content=b"weights", **metrics):
    path = checkpoints.begin(folder, step)
    (path / "hf").mkdir()
    (path / "hf" / "model.safetensors").write_bytes(content)
    return checkpoints.seal(folder, step, json.dumps({"step": step}), metrics)


def there(url, folder):
    """Complete checkpoints in the mirror."""
    place = RemoteFolder(f"{url}/{folder.id}")
    return [n for n in place.names("checkpoints") if place.read(f"checkpoints/{n}/manifest.json")]


def test_a_machine_with_an_empty_disk_gets_the_newest_whole_checkpoint(storage, tmp_path):
    here = folder_of(tmp_path / "here")
    mirror = Mirror(storage, here, keep=2)
    for step in (1, 2):
        mirror.put(save(here, step, b"weights of %d" % step))
    mirror.finish()
    assert mirror.problems() == []
    elsewhere = folder_of(tmp_path / "elsewhere")
    found = Mirror(storage, elsewhere, keep=2).restore()
    assert found == elsewhere.checkpoint(2)
    assert checkpoints.newest(elsewhere, pytest.fail) == found
    assert (found / "hf" / "model.safetensors").read_bytes() == b"weights of 2"
    assert checkpoints.controller_state(found) == {"step": 2}
    assert Mirror(storage, here, keep=2).restore() is None, "nothing newer than what is here"


def test_keeps_the_newest_the_best_and_what_the_registry_refers_to(storage, tmp_path):
    here = folder_of(tmp_path)
    mirror = Mirror(storage, here, keep=2)
    for step in range(1, 7):
        path = save(here, step, **{"val/accuracy": 0.9 if step == 2 else 0.1 * step})
        if step == 3:
            (path / REGISTERED).write_text("{}")
        mirror.put(path)
    mirror.finish()
    assert mirror.problems() == []
    assert there(storage, here) == [f"step-{n:06d}" for n in (2, 3, 5, 6)]


def test_a_damaged_one_is_skipped_for_the_one_before(storage, tmp_path):
    here = folder_of(tmp_path / "here")
    mirror = Mirror(storage, here, keep=3)
    for step in (1, 2):
        mirror.put(save(here, step))
    mirror.finish()
    other = tmp_path / "other"
    other.write_bytes(b"wEights")
    RemoteFolder(f"{storage}/{here.id}").put(other, "checkpoints/step-000002/hf/model.safetensors")
    elsewhere = folder_of(tmp_path / "elsewhere")
    assert Mirror(storage, elsewhere, keep=3).restore() == elsewhere.checkpoint(1)


def test_a_checkpoint_done_anew_replaces_the_old_one(storage, tmp_path):
    here = folder_of(tmp_path / "here")
    for content in (b"first", b"again"):
        mirror = Mirror(storage, here, keep=1)
        mirror.put(save(here, 1, content))
        mirror.finish()
    elsewhere = folder_of(tmp_path / "elsewhere")
    found = Mirror(storage, elsewhere, keep=1).restore()
    assert (found / "hf" / "model.safetensors").read_bytes() == b"again"


def killed_while_uploading(url: str, folder: RunFolder, env: dict[str, str]) -> None:
    """SIGKILL to a process that has uploaded some of the files of step 2 and not its manifest."""
    code = """
        import sys, time
        from pathlib import Path
        from dapo.data.remote import RemoteFolder
        from dapo.observe.run_folder import RunFolder
        from dapo.runtime.mirror import Mirror
        put = RemoteFolder.put
        def slow(self, file, name):
            put(self, file, name)
            if name.endswith("hf/model.safetensors"):
                print("half", flush=True)
                time.sleep(60)
        RemoteFolder.put = slow
        folder = RunFolder(Path(sys.argv[2]))
        mirror = Mirror(sys.argv[1], folder, keep=2)
        mirror.put(folder.checkpoint(2))
        mirror.finish()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), url, str(folder.root)]
    child = subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "half\n"
    child.send_signal(signal.SIGKILL)
    child.wait(20)


def interrupted(url: str, tmp_path: Path, env: dict[str, str]) -> None:
    here = folder_of(tmp_path / "here")
    mirror = Mirror(url, here, keep=2)
    mirror.put(save(here, 1))
    mirror.finish()
    save(here, 2)
    killed_while_uploading(url, here, env)
    assert "step-000002" in RemoteFolder(f"{url}/{here.id}").names("checkpoints"), "part of it is there"
    assert there(url, here) == ["step-000001"]
    elsewhere = folder_of(tmp_path / "elsewhere")
    assert Mirror(url, elsewhere, keep=2).restore() == elsewhere.checkpoint(1)
    # Where it was saved, the next start uploads it.
    again = Mirror(url, here, keep=2)
    assert again.restore() is None
    again.finish()
    assert there(url, here) == ["step-000001", "step-000002"]


def test_an_interrupted_upload_is_never_taken_for_a_checkpoint_and_done_again(tmp_path):
    interrupted(f"file://{tmp_path}/storage", tmp_path, {})


@S3
def test_nor_on_a_server(s3_server, tmp_path, monkeypatch):
    interrupted(s3_folder(s3_server, monkeypatch), tmp_path, s3_variables(s3_server))


def test_an_upload_that_fails_is_an_alarm_and_training_goes_on(tmp_path):
    blocked = tmp_path / "storage"
    blocked.write_text("a file where the folder should be")
    controller, _, folder = make(tmp_path / "runs")
    controller.mirror = Mirror(f"file://{blocked}", folder, keep=2)
    assert controller.run() == "finished"
    alarms = [e.data for e in read(folder.journal) if e.kind == "alarm" and e.data["name"] == "mirror"]
    assert [a["message"].split()[0] for a in alarms] == ["step-000002", "step-000004"]
    assert "it is whole in the run folder" in alarms[0]["message"]
    assert kinds(folder)[-2:] == [("checkpoint", 4), ("ended", 4)]


def test_an_upload_is_repeated_before_it_counts_as_failed(storage, tmp_path, monkeypatch):
    here, failures, put = folder_of(tmp_path), [], RemoteFolder.put

    def sometimes(self, file, name):
        if len(failures) < 3:
            failures.append(name)
            raise ConnectionError("reset by peer")
        put(self, file, name)

    monkeypatch.setattr(RemoteFolder, "put", sometimes)
    mirror = Mirror(storage, here, keep=1)
    mirror.put(save(here, 1))
    mirror.finish()
    assert mirror.problems() == []
    assert there(storage, here) == ["step-000001"]


def test_a_run_goes_on_on_another_machine_with_its_records(storage, tmp_path):
    first, _, folder = make(tmp_path / "one", train={"steps": 2})
    first.mirror = Mirror(storage, folder, keep=2)
    first.run()
    folder.mlflow.write_text('{"run_id": "abc", "offset": 10}')
    first.mirror = Mirror(storage, folder, keep=2)
    shutil.rmtree(folder.checkpoint(2))
    first.mirror.put(save(folder, 2))
    first.mirror.finish()

    _, _, elsewhere = make(tmp_path / "two", train={"steps": 2})
    assert elsewhere.id == folder.id
    assert restore_records(storage, elsewhere)
    assert elsewhere.mlflow.read_text() == folder.mlflow.read_text()
    assert elsewhere.validation_table(2).exists()
    before = [(e.kind, e.step) for e in read(elsewhere.journal)]
    assert ("checkpoint", 2) in before
    assert not restore_records(storage, elsewhere), "once"
    assert not Journal(elsewhere.journal).append("step", 2, metrics={}), "what happened once is not reported twice"
    assert Mirror(storage, elsewhere, keep=2).restore() == elsewhere.checkpoint(2)


def test_a_run_from_the_beginning_does_not_touch_an_earlier_ones_mirror(storage, tmp_path):
    here = folder_of(tmp_path)
    require_unused(storage, here)
    mirror = Mirror(storage, here, keep=1)
    mirror.put(save(here, 1))
    mirror.finish()
    with pytest.raises(ConfigError, match=r"train\.resume=never, and train\.mirror has checkpoints"):
        require_unused(storage, here)


def test_a_mirror_that_cannot_be_read_stops_only_a_run_that_may_need_it(tmp_path, monkeypatch):
    def away(self, under=""):
        raise ConnectionError("connection refused")

    monkeypatch.setattr(RemoteFolder, "names", away)
    here = folder_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be read \(ConnectionError: connection refused\)"):
        Mirror("memory://away", here, keep=1).restore()
    save(here, 1)
    mirror = Mirror("memory://away", here, keep=1)
    assert mirror.restore() is None
    assert "the run goes on from step-000001" in mirror.problems()[0]


def test_an_end_that_somebody_waits_for_does_not_wait_for_an_upload(tmp_path, monkeypatch):
    here = folder_of(tmp_path)
    monkeypatch.setattr(RemoteFolder, "put", lambda self, file, name: time.sleep(30))
    mirror = Mirror(f"file://{tmp_path}/storage", here, keep=1)
    mirror.put(save(here, 1))
    mirror.finish(limit_s=0.2)
    assert "the next start uploads it" in mirror.problems()[0]
