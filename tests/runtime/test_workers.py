"""What must be set before a process starts is looked for in the worker's own process, on a real Ray."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap

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
                workers.ready(workers.begin(Path("/no/weights")))
            except Exception as error:
                print(type(error).__name__, str(error).splitlines()[0])
            workers.close()
        ray.shutdown()
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"SET_BEFORE": "1", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as place:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), place], env=env, capture_output=True, text=True, timeout=250
        )
    had, lacked = done.stdout.splitlines()[-2:]
    assert had.startswith("WeightsError /no/weights has no config.json"), "this one went on to the weights"
    assert lacked.startswith("EnvironmentCheckError worker 0 on ")
    assert "was started without SET_TOO_LATE=1 (ray.preload)" in lacked


def lacking_when_started_with(env, preload):
    """What a process that was started with `env` says."""
    script = (
        "import json, sys; from dapo.plan.variables import lacking; print(json.dumps(lacking(json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(preload)], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_process_is_judged_by_what_it_was_started_with(monkeypatch):
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "A": "1", "B": "other"}
    assert lacking_when_started_with(env, {"A": "1"}) == []
    found = lacking_when_started_with(env, {"A": "1", "B": "2", "C": "3"})
    assert found == ["B=other instead of 2", "without C=3"]
    monkeypatch.setenv("LD_PRELOAD", "/set/now.so")
    assert lacking({"LD_PRELOAD": "/set/now.so"}) == ["without LD_PRELOAD=/set/now.so"]


def test_a_preloaded_library_must_be_mapped():
    """The loader skips a library it cannot use with a line on the terminal, and starts the process without it."""
    preload = {"LD_PRELOAD": "/no/such/library.so"}
    found = lacking_when_started_with({"PYTHONPATH": os.pathsep.join(sys.path), **preload}, preload)
    assert found == ["/no/such/library.so of LD_PRELOAD is not mapped"]
