"""The same through a real MLflow server: registry by reference, evaluations, comparison."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from dapo.eval.compare import compare
from dapo.eval.register import register
from dapo.eval.runs import read_runs
from dapo.observe.registry import CHAMPION, PREVIOUS, Registry
from dapo.observe.shipper import Shipper, connect
from dapo.runtime.cluster import free_port
from dapo.runtime.telemetry import TELEMETRY_OFF
from tests.eval.remembered import make_run, save_checkpoint
from tests.observe import run_folder
from tests.observe.run_folder import STEPS

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(root, database, *artifacts):
    """An MLflow server over this database, in the folder `root`; its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{database}", *artifacts]
    env = os.environ | TELEMETRY_OFF | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (root / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=root)
    uri = f"http://127.0.0.1:{port}"
    end_at = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2)
            break
        except OSError:
            assert process.poll() is None, (root / "server.log").read_text()
            assert time.monotonic() < end_at, "the MLflow server does not start"
            time.sleep(0.5)
    yield uri
    os.killpg(process.pid, 15)
    process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    with serving(root, root / "server.db", "--artifacts-destination", str(root / "artifacts")) as uri:
        yield uri


def test_a_version_is_registered_by_reference_and_promoted(server, tmp_path):
    mlflow = {"tracking_uri": server, "registered_model": "figures"}
    folder, config, journal = run_folder.make(tmp_path, mlflow=mlflow)
    first, second = (save_checkpoint(folder, STEPS + i, 0.75, str(i)) for i in range(2))
    journal.append("checkpoint", STEPS + 1, path=f"checkpoints/{second.name}", metrics={}, best=False, seconds=0.1)
    Shipper(folder, config).ship()
    one, two = register(first, config), register(second, config)
    assert (one.version, two.version) == (1, 2)
    assert register(first, config) == one
    registry = Registry(server, "figures")
    registry.promote(one, over=None)
    registry.promote(two, over=one)
    assert registry.aliases() == {CHAMPION: 2, PREVIOUS: 1}
    registry.rollback()
    assert registry.require(CHAMPION).folder == first / "hf"
    assert registry.get("nobody") is None
    assert Registry(server, "unheard").get(CHAMPION) is None


def test_runs_are_compared_through_the_server(server, tmp_path):
    course = {"steps": 2, "seconds": 1.0, "responses": 8, "mlflow": {"tracking_uri": server}}
    make_run(tmp_path, "plain", gain=0.01, right=50, **course)
    make_run(tmp_path, "better", gain=0.05, right=80, seed=1, **course)
    runs = read_runs(connect(server), ["plain", "better"])
    folders = [Path(connect(server).get_run(run.id).data.tags["dapo.run_folder"]) for run in runs]
    assert not any(folder.exists() for folder in folders), "the machines that trained are gone"
    found = compare(runs)
    assert found.pairs[0].difference.value == pytest.approx(0.3)
    assert found.equal["step"]
    assert found.slices
    assert json.dumps([d.key for d in found.differences]) == '["name", "seed"]'


def test_files_that_only_the_server_sees_are_had_through_it(tmp_path, monkeypatch):
    """Runs wrote to the database themselves; the server over it, as `dapo up` starts it, is asked from elsewhere."""
    there = tmp_path / "there"
    there.mkdir()
    course = {"steps": 2, "seconds": 1.0, "responses": 8}
    make_run(there, "plain", gain=0.01, right=50, **course)
    make_run(there, "better", gain=0.05, right=80, seed=1, **course)
    database = there / "runs" / "mlflow.db"
    # Relative to the server's folder, the addresses lead nowhere from here, as another machine's paths do.
    with contextlib.closing(sqlite3.connect(database)) as store, store:
        store.execute("UPDATE runs SET artifact_uri = replace(artifact_uri, ?, '')", (f"{there}/",))
    monkeypatch.chdir(tmp_path)
    root = ("--default-artifact-root", str(there / "runs" / "mlartifacts"), "--no-serve-artifacts")
    with serving(there, database, *root) as uri:
        client = connect(uri)
        runs = read_runs(client, ["plain", "better"])
        assert client.list_artifacts(runs[0].id) == [], "MLflow's client looks here"
        found = compare(runs)
    assert found.pairs[0].difference.value == pytest.approx(0.3)
    assert runs[0].config["seed"] == "0"
    assert runs[0].packages["torch"]
