"""A job's log, passed on line by line, by one flow run at a time."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from dapo.observe.run_folder import RunFolder
from tasks.watch import LogStream, followed, only_follower

FOLLOWER = """
import logging, pathlib, sys, time
from dapo.observe.run_folder import RunFolder
from tasks.watch import only_follower
with only_follower(RunFolder(pathlib.Path(sys.argv[1])), logging.getLogger()):
    print("follows", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def numbered(first, last):
    return "".join(f"line {n}\n" for n in range(first, last))


def test_lines_are_passed_on_as_they_are_written_and_half_a_line_waits(tmp_path, messages):
    path = tmp_path / "job.log"
    stream = LogStream(path, logging.getLogger("job"))
    stream.pump()
    path.write_text("first\nsec")
    stream.pump()
    with path.open("a") as file:
        file.write("ond\n")
    stream.pump()
    assert messages() == ["first", "second"]


def test_whoever_follows_anew_begins_with_the_last_lines(tmp_path, messages):
    path = tmp_path / "job.log"
    path.write_text(numbered(0, 1000))
    LogStream(path, logging.getLogger("job")).pump()
    assert messages() == numbered(960, 1000).splitlines()


def test_of_long_last_lines_fewer_are_passed_on_and_none_in_part(tmp_path, messages):
    path = tmp_path / "job.log"
    long = ["a" * 3000, "b" * 3000, "c" * 3000]
    path.write_text("\n".join(long) + "\n")
    LogStream(path, logging.getLogger("job")).pump()
    assert messages() == long[1:]


def test_the_rest_of_a_flood_is_counted(tmp_path, messages, monkeypatch):
    path = tmp_path / "job.log"
    path.write_text("")
    stream = LogStream(path, logging.getLogger("job"))
    path.write_text(numbered(0, 1000))
    stream.pump()
    assert messages() == numbered(0, 40).splitlines()
    monkeypatch.setattr("tasks.watch._PER_S", 0.0)
    stream.pump()
    assert messages()[40:] == [f"960 lines more in {path}"]


def test_who_follows_is_written_down_and_nobody_does_once_it_is_killed(tmp_path):
    folder = RunFolder(tmp_path / "one")
    assert not followed(folder)
    child = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(folder.root)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"follows\n"
    assert followed(folder)
    assert f"process {child.pid}" in (tmp_path / ".followers" / "one").read_text()
    child.kill()
    child.wait()
    assert not followed(folder)
    with only_follower(folder, logging.getLogger()):
        assert followed(folder)
