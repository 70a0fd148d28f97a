"""The same run on a Ray cluster at an address, which asks for a token and was started by somebody else."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlflow
import pytest

from dapo.observe.shipper import tracking_uri
from dapo.runtime.cluster import free_port
from dapo.runtime.dashboard import Dashboard, DashboardAway
from dapo.runtime.telemetry import TELEMETRY_OFF
from tests.e2e.pipeline import Pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MARK = "TEST_RAY_CLUSTER"


@pytest.fixture(scope="module")
def cluster():
    """Address and token of a head with a folder and ports of its own, which knows nothing of us."""
    token, mark = secrets.token_hex(32), secrets.token_hex(8)
    place = tempfile.mkdtemp(prefix="ray-")  # sockets lie there: the path must be short
    address = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={free_port()}", f"--ray-client-server-port={free_port()}", f"--temp-dir={place}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={address.rpartition(':')[2]}", "--num-cpus=2"]
    command += ["--dashboard-agent-listen-port=0", "--object-store-memory=200000000", "--min-worker-port=0"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    env |= TELEMETRY_OFF | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, MARK: mark}
    env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    log = Path(place) / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(command, env=env, cwd=place, stdout=output, stderr=output, start_new_session=True)
    end_at = time.monotonic() + 120
    while True:
        try:
            Dashboard(address, token).version()
            break
        except DashboardAway:
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < end_at, log.read_text()
            time.sleep(0.5)
    yield address, token
    _end(mark)
    head.wait(10)
    shutil.rmtree(place, ignore_errors=True)


def _end(mark: str) -> None:
    for entry in Path("/proc").iterdir():
        try:
            ours = entry.name.isdigit() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes()
        except OSError:
            continue
        if ours:
            os.kill(int(entry.name), 9)


def pipeline(home, cluster, *overrides, token=None):
    address, right = cluster
    given = (f"ray.address={address}", "model.parallel.world_size=1", "ray.env.TEST_TOLD=by-runtime-env", *overrides)
    return Pipeline(home, given, {"RAY_AUTH_TOKEN": right if token is None else token})


def test_a_run_goes_to_the_cluster_and_on_from_its_mirror_when_this_disk_is_empty(cluster, tmp_path):
    mirror = f"train.mirror=file://{tmp_path}/storage"
    first = pipeline(tmp_path, cluster, mirror)
    first.run(600)
    assert [e.step for e in first.events("step")] == [1, 2]
    jobs = Dashboard(*cluster).jobs()
    [job] = [j for j in jobs if j["submission_id"].startswith(f"dapo-{first.folder.id}")]
    assert job["runtime_env"]["working_dir"].startswith("gcs://"), "our code went with the job"
    assert job["runtime_env"]["env_vars"]["TEST_TOLD"] == "by-runtime-env"
    assert not (first.folder.root.parent / ".ray" / "head.json").exists(), "no Ray of our own was started"
    before = json.loads(first.folder.mlflow.read_text())["run_id"]

    shutil.rmtree(first.folder.root)
    second = pipeline(tmp_path, cluster, mirror, "train.steps=3")
    printed = second.run(600)
    assert "starting at step 2" in printed
    assert [e.step for e in second.events("step")] == [1, 2, 3]
    assert json.loads(second.folder.mlflow.read_text())["run_id"] == before
    client = mlflow.MlflowClient(tracking_uri(second.config))
    assert [m.step for m in client.get_metric_history(before, "train/loss")] == [1, 2, 3]
    assert Dashboard(*cluster).version(), "a cluster that is not ours is left running"


def refused(run: Pipeline) -> str:
    started = time.monotonic()
    run.start()
    assert run.process.wait(120) == 2, run.log.read_text()
    assert time.monotonic() - started < 60
    return " ".join(run.log.read_text().split())


def test_a_wrong_token_is_told_at_once(cluster, tmp_path):
    printed = refused(pipeline(tmp_path, cluster, token="0" * 64))
    assert "refuses us (HTTP 403)" in printed or "refuses us (HTTP 401)" in printed
    assert "ray.token_env" in printed


def test_an_address_where_nothing_answers_is_told_at_once(cluster, tmp_path):
    printed = refused(pipeline(tmp_path, (f"http://127.0.0.1:{free_port()}", cluster[1])))
    assert "does not answer" in printed
    assert "ray start --head" in printed
