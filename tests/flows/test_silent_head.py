"""A local Ray that lives but does not answer: nobody ends it while a job runs on it."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from dapo.config import io
from dapo.errors import EnvironmentCheckError
from dapo.observe.run_folder import RunFolder
from dapo.runtime import cluster, head, processes
from dapo.runtime.ray_job import RayJob
from tests.flows.conftest import standin_tree

SLEEP = ("-c", "import time; print('up', flush=True); time.sleep(600)")


@pytest.fixture
def silent(monkeypatch):
    """Makes a head's dashboard unreachable for a while."""
    monkeypatch.setattr(cluster, "_BUSY_S", 0.2)
    before = []

    def silence(place):
        saved = head.remembered(place)
        before.append((place, saved))
        head.remember(place, replace(saved, address=f"http://127.0.0.1:{cluster.free_port()}"))

    yield silence
    for place, saved in before:
        head.remember(place, saved)


def test_nobody_ends_a_silent_ray_on_which_a_training_runs(ray, shared, silent, monkeypatch):
    config = io.validate(standin_tree(shared, "quiet"))
    run = RunFolder.of(config)
    run.root.mkdir(parents=True)
    job = RayJob(ray, run, config, entrypoint=(*SLEEP, "dapo.runtime.job"))
    job.start()
    while "up" not in ray.log(job.id):
        time.sleep(0.1)
    place = cluster.state_folder(config)
    silent(place)
    other = io.validate(standin_tree(shared, "another"))
    with pytest.raises(EnvironmentCheckError, match=f"not answered .* training {run.id} runs on it: nothing was"):
        cluster.connect(other)
    assert [(found.kind, found.run) for found in cluster.local_jobs(other)] == [("training", run)]
    assert cluster.end_unused(other) == f"training {run.id}"
    monkeypatch.setattr(cluster, "_user", 1)
    head.remember(place, replace(head.remembered(place), users=(1,)))
    assert cluster.leave(other) == []
    assert ray.job(job.id)["status"] == "RUNNING"
    job.kill()


def test_a_silent_ray_without_a_job_is_ended(tmp_path, silent):
    config = io.validate(standin_tree(tmp_path, "any"))
    place = cluster.state_folder(config)
    place.mkdir(parents=True)
    (place / "token").write_text("secret")
    lost = head.LocalHead("", f"mark-{time.time_ns()}", str(tmp_path / "ray"), ())
    head.remember(place, lost)
    silent(place)
    raylet = subprocess.Popen([sys.executable, *SLEEP], env={"MARK": lost.mark}, stdout=subprocess.PIPE)
    raylet.stdout.readline()
    assert len(processes.family(lost.mark)) == 1
    assert cluster.end_unused(config) == ""
    assert raylet.wait(5) != 0
    assert head.remembered(place) is None
