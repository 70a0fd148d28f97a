"""The Ray job's life on a real local Ray, with a stand-in for the training itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.errors import EnvironmentCheckError, TrainingError
from dapo.observe.journal import last_end
from dapo.observe.run_folder import RunFolder
from dapo.runtime import cluster, processes, ray_job
from dapo.runtime.dashboard import Dashboard, DashboardAway
from dapo.runtime.ray_job import RayJob
from tasks.train import stop_running_job

STANDIN = str(Path(__file__).parent / "standin_job.py")


@pytest.fixture
def root(shared):
    return shared / "runs"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(ray_job, "STATUS_EVERY_S", 0.5)


def make_run(root, name, **env):
    config = io.validate(
        {
            "name": name,
            "run_root": str(root),
            "train": {"steps": 4, "test_freq": 2, "save_freq": 2},
            "ray": {"env": {"STANDIN_SECONDS": "0.05", **env}},
        }
    )
    run = RunFolder.of(config)
    run.root.mkdir(parents=True)
    io.save(config, run.config)
    run.inputs.write_text(json.dumps({"data": str(root), "weights": str(root)}))
    return run, config


def job_of(ray, run, config, **options):
    return RayJob(ray, run, config, entrypoint=[STANDIN], back_off_s=[0.1], **options)


def kinds(events):
    return [(e.kind, e.step) for e, _ in events if e.kind in ("validation", "checkpoint", "ended")]


def test_events_are_followed_to_the_end_and_offsets_continue_behind_them(ray, root):
    run, config = make_run(root, "follow")
    job = job_of(ray, run, config)
    assert job.start()
    assert job.id == f"dapo-{run.id}-1"
    events = list(job.follow())
    expected = [("validation", 0), ("validation", 2), ("checkpoint", 2), ("validation", 4), ("checkpoint", 4)]
    assert kinds(events) == [*expected, ("ended", 4)]
    assert (last_end(run.journal).step, last_end(run.journal).data["status"]) == (4, "finished")
    third = events[2][1]
    assert [e for e, _ in events[3:]] == [e for e, _ in job.follow(third)]
    job.keep_output()
    assert "attempt 1" in (run.root / f"{job.id}.log").read_text()


def test_killed_job_is_started_again_and_goes_on_from_its_checkpoint(ray, root):
    run, config = make_run(root, "killed", STANDIN_DIE_AT="3")
    job = job_of(ray, run, config)
    job.start()
    events = list(job.follow())
    assert job.id.endswith("-2")
    started = [(e.data["attempt"], e.step) for e, _ in events if e.kind == "started"]
    assert started == [(1, 0), (2, 2)]
    assert [e.step for e, _ in events if e.kind == "step"] == [1, 2, 3, 4]


def test_job_that_keeps_crashing_ends_with_the_count_and_the_log(ray, root):
    run, config = make_run(root, "crashing", STANDIN_DIE_AT="3")
    config = config.model_copy(update={"ray": config.ray.model_copy(update={"restarts": 0})})
    job = job_of(ray, run, config)
    job.start()
    with pytest.raises(TrainingError, match=r"started again 0 times \(ray.restarts=0\).*job.log"):
        list(job.follow())


@pytest.mark.parametrize("error", ["RewardError", "ProofError"])
def test_lasting_failure_is_not_started_again(ray, root, error):
    run, config = make_run(root, f"failing-{error}", STANDIN_FAIL_AT="2", STANDIN_ERROR=error)
    job = job_of(ray, run, config)
    job.start()
    with pytest.raises(TrainingError, match=r"the reward function is broken\. Log: .*job\.log"):
        list(job.follow())
    assert job.id.endswith("-1")


@pytest.mark.parametrize("patience", [0, 3])
def test_job_that_was_asked_to_stop_is_not_started_again_when_it_fails(ray, root, patience):
    """Asked before it failed, or in the pause before its next attempt."""
    run, config = make_run(root, f"unwanted{patience}", STANDIN_FAIL_AT="1", STANDIN_ERROR="EngineError")
    job = job_of(ray, run, config)
    job.back_off_s = (600.0,)
    job.start()
    looks = []

    def idle():
        if last_end(run.journal):
            looks.append(time.monotonic())

    events = list(job.follow(idle=idle, asked_to_stop=lambda: len(looks) > patience))
    assert events[-1][0].data["status"] == "failed"
    assert job.id.endswith("-1")


def test_second_follower_takes_over_the_running_job_and_stops_it(ray, root):
    run, config = make_run(root, "taken_over", STANDIN_SECONDS="0.5")
    job_of(ray, run, config).start()
    second = job_of(ray, run, config)
    assert not second.start()
    assert second.id == f"dapo-{run.id}-1"
    second.request_stop("asked by a test")
    events = list(second.follow())
    assert events[-1][0].data == {"status": "stopped", "reason": "asked by a test"}
    # Started again it goes on, and the old request does not stop it.
    third = job_of(ray, run, config)
    assert third.start()
    assert third.id == f"dapo-{run.id}-2"
    assert kinds(third.follow())[-1] == ("ended", 4)


def test_job_gets_the_configured_environment_and_phones_nobody(ray, root):
    run, config = make_run(root, "environment", MY_VARIABLE="here")
    job = job_of(ray, run, config)
    job.entrypoint = ("-c", "import os, sys; sys.exit('\\n'.join(f'{k}={v}' for k, v in os.environ.items()))")
    job.start()
    with pytest.raises(TrainingError):
        list(RayJob.follow(_without_restarts(job)))
    text = ray.log(job.id)
    for line in ("MY_VARIABLE=here", "DO_NOT_TRACK=true", "RAY_USAGE_STATS_ENABLED=0", "MLFLOW_DISABLE_TELEMETRY=true"):
        assert line in text


def _without_restarts(job):
    job.config = job.config.model_copy(update={"ray": job.config.ray.model_copy(update={"restarts": 0})})
    return job


def test_remote_cluster_gets_the_code_but_not_the_data_and_asks_for_the_token(ray, root, tmp_path, monkeypatch):
    (tmp_path / "ours.py").write_text("import os, sys\nsys.exit(f'files {sorted(os.listdir())} in {os.getcwd()}')\n")
    for name in ("runs", "cache", ".venv"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "large").write_text("data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUR_TOKEN", ray.token)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run, config = make_run(root, "remote", PATH=path)
    remote = config.ray.model_copy(update={"address": ray.address, "token_env": "OUR_TOKEN", "restarts": 0})
    config = config.model_copy(update={"ray": remote})
    elsewhere = cluster.connect(config)
    assert not elsewhere.local
    job = RayJob(elsewhere, run, config, entrypoint=["ours.py"])
    assert job.start()
    with pytest.raises(TrainingError, match="crashed"):
        list(job.follow())
    output = ray.log(job.id)
    assert "files ['ours.py'] in " in output
    assert str(tmp_path) not in output.partition(" in ")[2]
    monkeypatch.delenv("OUR_TOKEN")
    with pytest.raises(EnvironmentCheckError, match="refuses us"):
        cluster.connect(config)


def test_job_of_a_flow_run_without_a_process_is_stopped_with_a_checkpoint(ray, root, monkeypatch):
    run, config = make_run(root, "orphan", STANDIN_SECONDS="0.5")
    monkeypatch.setenv("OUR_TOKEN", ray.token)
    config = io.override(config, {"ray.address": ray.address, "ray.token_env": "OUR_TOKEN"})
    job_of(ray, run, config).start()
    while not run.journal.exists():
        time.sleep(0.1)
    stop_running_job(config)
    end = last_end(run.journal)
    assert end.data == {"status": "stopped", "reason": "the flow run was cancelled"}
    assert run.checkpoint(end.step).is_dir()


def test_head_is_found_again_and_asks_for_its_token(ray, root):
    assert cluster.connect(RunConfig(run_root=str(root))) == ray
    with pytest.raises(EnvironmentCheckError, match=r"refuses us .*ray\.token_env"):
        Dashboard(ray.address).jobs()


def test_head_listens_on_loopback_only(ray, root):
    head = json.loads((root / ".ray" / "head.json").read_text())
    pids = {p.pid for p in processes.family(head["mark"])}
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(fd) if fd.is_symlink() else ""
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    hosts = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            place, state, inode = line.split()[1], line.split()[3], line.split()[9]
            if state == "0A" and inode in inodes:
                hosts.add(place.rpartition(":")[0])
    assert hosts
    assert hosts <= {"0100007F", "0000000000000000FFFF00000100007F"}, "127.0.0.1, as IPv4 or mapped into IPv6"


def test_port_taken_by_another_program_is_named():
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"], stdout=subprocess.PIPE, text=True
    )
    try:
        port = server.stdout.readline().split("port ")[1].split()[0] if server.stdout else ""
        config = RunConfig.model_validate({"ray": {"address": f"http://127.0.0.1:{port}"}})
        with pytest.raises(EnvironmentCheckError, match=r"not a Ray dashboard .*set ray\.address"):
            cluster.connect(config)
    finally:
        server.kill()
        server.wait()


def test_cluster_that_does_not_answer_is_named_with_the_remedy():
    config = RunConfig.model_validate({"ray": {"address": f"http://127.0.0.1:{cluster.free_port()}"}})
    with pytest.raises(EnvironmentCheckError, match=r"ray\.address=.* does not answer.*ray start --head"):
        cluster.connect(config)
    with pytest.raises(DashboardAway):
        Dashboard(config.ray.address).jobs()


def test_family_finds_renamed_and_orphaned_children():
    mark = f"mark-{time.time_ns()}"
    script = "import subprocess, time; subprocess.Popen(['sleep', '60'], env={}); print(1, flush=True); time.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        env={"MARK": mark},
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout
    parent.stdout.readline()
    assert len(processes.family(mark)) == 2
    assert processes.end_family(mark) == []
    assert parent.wait(5) != 0
