"""What must be set before a process starts is looked for in the worker's own process, on a real Ray."""

import os
import subprocess
import sys
import tempfile
import textwrap
from contextlib import contextmanager

import pytest

from dapo.plan.variables import lacking


@pytest.mark.slow
def test_a_worker_that_was_started_without_a_variable_says_so_before_it_loads_anything():
    script = """
        import os, sys
        from pathlib import Path
        import ray
        from dapo.config import io
        from dapo.errors import DapoError
        from dapo.runtime.workers import Workers
        ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, _temp_dir=sys.argv[1])
        os.environ["SET_TOO_LATE"] = "1"
        for name in ("SET_BEFORE", "SET_TOO_LATE"):
            workers = Workers(io.validate({"device": "cpu", "ray": {"preload": {name: "1"}}}))
            try:
                workers.get(workers.begin(Path("/no/weights")), 100, "loading")
            except Exception as error:
                print(type(error).__name__, str(error).splitlines()[0])
            workers.close()
        ray.shutdown()
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"SET_BEFORE": "1", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as place:
        told = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), place], env=env, capture_output=True, text=True, timeout=250
        )
    had, lacked = told.stdout.splitlines()[-2:]
    assert had.startswith("WeightsError /no/weights has no config.json"), "this one went on to the weights"
    assert lacked.startswith("EnvironmentCheckError worker 0 on ")
    assert "was started without SET_TOO_LATE=1 (ray.preload)" in lacked


@contextmanager
def started_with(env):
    """A process that runs; its number."""
    command = [sys.executable, "-c", "print(flush=True); input()"]
    child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    child.stdout.readline()
    yield child.pid
    child.communicate(b"\n")


def test_a_process_is_judged_by_what_it_was_started_with(monkeypatch):
    with started_with({"A": "1", "B": "other"}) as process:
        assert lacking({"A": "1"}, process) == []
        assert lacking({"A": "1", "B": "2", "C": "3"}, process) == ["B=other instead of 2", "without C=3"]
    monkeypatch.setenv("LD_PRELOAD", "/set/now.so")
    assert lacking({"LD_PRELOAD": "/set/now.so"}) == ["without LD_PRELOAD=/set/now.so"]


def test_a_preloaded_library_must_be_mapped():
    """The loader skips a library it cannot use with a line on the terminal, and starts the process without it."""
    env = {"LD_PRELOAD": "/no/such/library.so"}
    with started_with(env) as process:
        assert lacking(env, process) == ["/no/such/library.so of LD_PRELOAD is not mapped"]
