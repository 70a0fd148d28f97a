"""Checkpoints are whole or not there."""

import subprocess
import sys
import textwrap

import pytest

from dapo.errors import CheckpointError
from dapo.observe.layout import RunFolder
from dapo.runtime import checkpoints


def save(folder, step, **metrics):
    return checkpoints.write(
        folder, step, {"step": step}, metrics, lambda p: (p / "weights.bin").write_bytes(b"w" * 100)
    )


def test_what_was_written_is_found_again_whole(tmp_path):
    folder = RunFolder(tmp_path)
    save(folder, 1)
    path = save(folder, 2, **{"val/accuracy": 0.5})
    assert checkpoints.newest(folder, pytest.fail) == path
    assert checkpoints.controller_state(path) == {"step": 2}
    assert checkpoints.metrics_of(path) == {"val/accuracy": 0.5}


@pytest.mark.parametrize("harm", ["missing", "short", "changed", "no manifest"])
def test_a_damaged_one_is_skipped_aloud_for_the_one_before(tmp_path, harm):
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


def test_a_crash_while_writing_leaves_no_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)

    def die(path):
        (path / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(folder, 3, {}, {}, die)
    assert checkpoints.newest(folder, pytest.fail) is None
    save(folder, 3)
    assert checkpoints.newest(folder, pytest.fail) == folder.checkpoint(3)


def test_keeps_the_newest_and_the_best(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(1, 7):
        save(folder, step, **{"val/accuracy": 0.5 + 0.1 * (step == 3)})
    checkpoints.prune(folder, keep=2, best=checkpoints.best(folder))
    assert [checkpoints.step_of(p) for p in sorted(folder.checkpoints.glob("step-*"))] == [3, 5, 6]


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    """The limit on file size makes the kernel refuse the write, as a full disk does."""
    folder = RunFolder(tmp_path)
    save(folder, 1)
    code = """
        import resource, signal, sys
        from pathlib import Path
        from dapo.errors import CheckpointError
        from dapo.observe.layout import RunFolder
        from dapo.runtime import checkpoints
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            checkpoints.write(RunFolder(Path(sys.argv[1])), 2, {}, {}, lambda p: (p / "big").write_bytes(b"x" * 5000))
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


def test_a_place_that_is_no_folder_is_one_sentence(tmp_path):
    blocked = tmp_path / "run"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(RunFolder(blocked), 1)
