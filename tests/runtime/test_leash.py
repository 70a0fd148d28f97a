"""Children end: when they are asked to, and when their parent is killed."""

import os
import subprocess
import sys
import time

import pytest

from dapo.errors import DapoError, EngineError, RewardError, named
from dapo.runtime import leash, processes

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("helper", helper.pid, flush=True)
time.sleep(600)
"""
PARENT = """
import os, sys, time
from dapo.runtime.leash import LeashedProcess
print(LeashedProcess("dapo.runtime.leash", "sleeper", env=os.environ).pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(600)")
    return os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', os.getcwd())}"}


def gone(pid):
    end_at = time.monotonic() + 5
    while processes.look(pid) and time.monotonic() < end_at:
        time.sleep(0.02)
    return processes.look(pid) is None


def test_one_that_does_not_listen_is_killed_with_what_it_started(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(leash, "_GRACE_S", 0.3)
    child = leash.LeashedProcess("dapo.runtime.leash", "stubborn", env=environment, log=tmp_path / "log")
    while not (words := child.last_lines()):
        assert child.poll() is None
        time.sleep(0.02)
    child.stop()
    child.stop()
    assert child.poll() is not None
    assert gone(int(words.removeprefix("helper ")))


def test_it_does_not_outlive_a_parent_that_is_killed(environment):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    assert processes.look(child)
    parent.kill()
    parent.wait()
    assert gone(child)


def test_an_error_keeps_its_class_on_the_way_out_of_a_process():
    assert isinstance(named("RewardError", "broken"), RewardError)
    assert type(named("KeyError", "what")) is DapoError
    assert str(named("KeyError", "what", EngineError)) == "what"
