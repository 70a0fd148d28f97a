"""Checkpoints are whole or not there, and training goes on while they are written."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from threading import Event, Thread, Timer

import pytest

from dapo.errors import CheckpointError
from dapo.observe.journal import Journal, read
from dapo.observe.run_folder import RunFolder
from dapo.runtime import checkpoints
from dapo.runtime.checkpoints import Checkpoints


def save(folder, step, **metrics):
    (checkpoints.begin(folder, step) / "weights.bin").write_bytes(b"w" * 100)
    return checkpoints.seal(folder, step, json.dumps({"step": step}), metrics)


class SlowPolicy:
    """Writes in a thread that waits for `disk`; the state is a number."""

    def __init__(self):
        self.value = 1
        self.disk = Event()
        self.threads = []
        self.error = None

    def save(self, folder):
        self._start(lambda content: (folder / "value").write_text(content))

    def export(self, folder):
        def write(content):
            folder.mkdir()
            (folder / "model.txt").write_text(content)

        self._start(write)

    def _start(self, write):
        content = str(self.value)

        def run():
            self.disk.wait()
            try:
                write(content)
            except OSError as error:
                self.error = CheckpointError(str(error))

        self.threads.append(Thread(target=run, daemon=True))
        self.threads[-1].start()

    def written(self, *, wait):
        if not wait and any(t.is_alive() for t in self.threads):
            return False
        for thread in self.threads:
            thread.join()
        self.threads, error, self.error = [], self.error, None
        if error:
            raise error
        return True


def make(tmp_path, policy=None, keep=2):
    folder = RunFolder(tmp_path)
    return folder, Checkpoints(folder, Journal(folder.journal), policy or SlowPolicy(), keep)


def steps_of(folder, kind="checkpoint"):
    return [e.step for e in read(folder.journal) if e.kind == kind]


def test_what_was_written_is_found_again_whole(tmp_path):
    folder = RunFolder(tmp_path)
    save(folder, 1)
    path = save(folder, 2, **{"val/accuracy": 0.5})
    assert checkpoints.newest(folder, pytest.fail) == path
    assert checkpoints.controller_state(path) == {"step": 2}
    assert checkpoints.metrics_of(path) == {"val/accuracy": 0.5}


@pytest.mark.parametrize("harm", ["missing", "short", "changed", "no manifest"])
def test_a_damaged_one_is_skipped_with_a_warning_for_the_one_before(tmp_path, harm):
    folder = RunFolder(tmp_path)
    good, bad = save(folder, 1), save(folder, 2)
    victim = bad / "weights.bin"
    match harm:
        case "missing":
            victim.unlink()
        case "short":
            victim.write_bytes(b"w" * 99)
        case "changed":
            victim.write_bytes(b"v" * 100)
        case "no manifest":
            (bad / checkpoints.MANIFEST).unlink()
    said = []
    assert checkpoints.newest(folder, said.append) == good
    assert len(said) == 1
    assert "step-000002 is damaged" in said[0]


def test_training_goes_on_while_a_checkpoint_of_before_is_written(tmp_path):
    policy = SlowPolicy()
    folder, saves = make(tmp_path, policy)
    controller = {"step": 5, "buffer": [1, 2]}
    saves.begin(5, controller, {"val/accuracy": 0.5})
    policy.value = 2
    controller["buffer"].clear()
    saves.poll()
    assert checkpoints.newest(folder, pytest.fail) is None
    assert steps_of(folder) == []
    policy.disk.set()
    saves.finish()
    path = folder.checkpoint(5)
    assert checkpoints.newest(folder, pytest.fail) == path
    assert (path / "state" / "value").read_text() == (path / "hf" / "model.txt").read_text() == "1"
    assert checkpoints.controller_state(path) == {"step": 5, "buffer": [1, 2]}
    (event,) = (e for e in read(folder.journal) if e.kind == "checkpoint")
    assert (event.step, event.data["path"], event.data["best"]) == (5, "checkpoints/step-000005", True)
    assert event.data["waited"] < event.data["seconds"]


def test_waiting_for_its_end_counts_as_waiting_for_a_checkpoint(tmp_path):
    policy = SlowPolicy()
    folder, saves = make(tmp_path, policy)
    saves.begin(1, {}, {})
    Timer(0.2, policy.disk.set).start()
    saves.begin(2, {}, {})
    saves.finish()
    first, second = (e.data for e in read(folder.journal) if e.kind == "checkpoint")
    assert 0.15 < first["waited"] <= first["seconds"]
    assert second["waited"] < 0.15  # not what it waited for the first


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path):
    policy = SlowPolicy()
    folder, saves = make(tmp_path, policy)
    saves.begin(1, {}, {})
    policy.disk.set()
    saves.begin(2, {}, {})
    assert steps_of(folder) == [1]
    saves.finish()
    assert steps_of(folder) == [1, 2]
    saves.begin(2, {}, {})  # it is there already
    saves.finish()
    assert steps_of(folder) == [1, 2]


def test_a_failed_one_is_an_alarm_that_loses_nothing_and_is_owed(tmp_path):
    policy = SlowPolicy()
    policy.disk.set()
    folder, saves = make(tmp_path, policy)
    saves.begin(1, {}, {})
    saves.finish()
    policy.error = CheckpointError("No space left on device")
    saves.begin(2, {}, {})
    saves.poll(wait=True)
    assert saves.retry_due
    (alarm,) = (e for e in read(folder.journal) if e.kind == "alarm")
    assert alarm.data["name"] == "checkpoint_failed"
    assert "checkpoint of step 2 could not be written" in alarm.data["message"]
    assert "No space left on device" in alarm.data["message"]
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step-000001"]
    with pytest.raises(CheckpointError, match="step 2 could not be written"):
        saves.finish()
    saves.begin(3, {}, {})
    saves.finish()
    assert not saves.retry_due
    assert checkpoints.newest(folder, pytest.fail) == folder.checkpoint(3)


class FailsToExport(SlowPolicy):
    """While the state is being written; that write fails as well, later."""

    def export(self, folder):
        self.writer = self.threads[0]
        Timer(0.2, self.disk.set).start()
        self.error = CheckpointError("the state's own error")
        raise OSError(28, "No space left on device")


def test_a_checkpoint_that_fails_while_a_part_is_written_waits_for_it_and_leaves_nothing(tmp_path):
    policy = FailsToExport()
    folder, saves = make(tmp_path, policy)
    saves.begin(1, {}, {})
    assert not policy.writer.is_alive()
    assert list(folder.checkpoints.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"step 1 .*No space left"):
        saves.finish()
    policy.export = lambda folder: SlowPolicy.export(policy, folder)
    saves.begin(2, {}, {})
    saves.finish()  # the error of the write before is not this one's
    assert checkpoints.newest(folder, pytest.fail) == folder.checkpoint(2)
    assert steps_of(folder, "alarm") == [1]


def test_what_fails_after_a_good_checkpoint_is_an_alarm(tmp_path, monkeypatch):
    policy = SlowPolicy()
    policy.disk.set()
    folder = RunFolder(tmp_path)

    def whole(path):
        raise OSError(5, "mirror is gone")

    def undeletable(path):
        raise PermissionError(13, "not yours", str(path))

    saves = Checkpoints(folder, Journal(folder.journal), policy, 1, whole)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", undeletable)
    for step in (1, 2):
        saves.begin(step, {}, {})
        saves.finish()
    assert not saves.retry_due
    assert steps_of(folder) == [1, 2]
    alarms = [e.data for e in read(folder.journal) if e.kind == "alarm"]
    assert [a["name"] for a in alarms] == ["checkpoint_after", "checkpoint_prune", "checkpoint_after"]
    assert "mirror is gone" in alarms[0]["message"]
    assert "step-000002 is whole, but an older one could not be removed: PermissionError" in alarms[1]["message"]


def test_a_folder_that_cannot_be_made_is_owed_too(tmp_path):
    folder, saves = make(tmp_path)
    folder.checkpoints.write_text("a file where the folder should be")
    saves.begin(1, {}, {})
    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        saves.finish()
    assert steps_of(folder, "alarm") == [1]


def test_a_full_disk_while_sealing_is_one_sentence_and_loses_nothing(tmp_path):
    """The limit on file size makes the kernel refuse the write, as a full disk does."""
    folder = RunFolder(tmp_path)
    save(folder, 1)
    code = """
        import resource, signal, sys
        from pathlib import Path
        from dapo.errors import CheckpointError
        from dapo.observe.journal import Journal
        from dapo.observe.run_folder import RunFolder
        from dapo.runtime.checkpoints import Checkpoints
        from tests.runtime.test_checkpoints import SlowPolicy
        policy = SlowPolicy()
        policy.disk.set()
        folder = RunFolder(Path(sys.argv[1]))
        saves = Checkpoints(folder, Journal(folder.journal), policy, 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        saves.begin(2, {"text": "x" * 5000}, {})
        try:
            saves.finish()
        except CheckpointError as error:
            print(error)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert "checkpoint of step 2 could not be written" in out
    assert "File too large" in out
    assert checkpoints.newest(folder, pytest.fail) == folder.checkpoint(1)
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step-000001"]


OPERATIONS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove")


def killed_at(operation, folder):
    """Save steps 1 and 2 in a child process that is killed before its n-th file operation; False: it ended before."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(event, arguments):
            nonlocal count
            if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove") and str(folder.root) in str(
                arguments
            ):
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        policy = SlowPolicy()
        policy.disk.set()
        saves = Checkpoints(folder, Journal(folder.journal), policy, keep=1)
        for step in (1, 2):
            policy.value = step
            saves.begin(step, {"step": step}, {})
            saves.finish()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_any_moment_leaves_the_newest_whole_one_and_the_next_start_goes_on(tmp_path):
    seen, operation = set(), 0
    killed = True
    while killed:
        operation += 1
        folder = RunFolder(tmp_path / str(operation))
        folder.root.mkdir()
        killed = killed_at(operation, folder)
        path = checkpoints.newest(folder, lambda text: None)
        step = None if path is None else checkpoints.step_of(path)
        if path is not None:
            assert (path / "state" / "value").read_text() == (path / "hf" / "model.txt").read_text() == str(step)
            assert checkpoints.controller_state(path) == {"step": step}
        assert step in (None, 1) or folder.checkpoint(2).exists()
        seen.add(step)
        # The next attempt: what it goes on from is in the journal, what was half written is gone.
        policy = SlowPolicy()
        policy.disk.set()
        again = Checkpoints(folder, Journal(folder.journal), policy, keep=1)
        if path is not None:
            again.resumed(path)
        again.begin(3, {}, {})
        again.finish()
        assert [p.name for p in folder.checkpoints.iterdir()] == ["step-000003"]
        assert steps_of(folder) == sorted({*steps_of(folder), 3} | ({step} - {None}))
    assert seen == {None, 1, 2}
    assert operation > 20


def test_keeps_the_newest_and_the_best(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(1, 7):
        save(folder, step, **{"val/accuracy": 0.5 + 0.1 * (step == 3)})
    checkpoints.prune(folder, keep=2, best=checkpoints.best(folder))
    assert [checkpoints.step_of(p) for p in sorted(folder.checkpoints.glob("step-*"))] == [3, 5, 6]
