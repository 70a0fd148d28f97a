"""Detached processes of `dapo up`: found again, ended whole, and never taken for somebody else's."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from dapo.errors import ConfigError, EnvironmentCheckError
from dapo.runtime import processes
from dapo.runtime.cluster import free_port
from dapo.runtime.head import LocalHead
from flows import up
from flows.daemon import Service
from flows.down import down

SERVER = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]
# A child in the session, one that left it, and the end of the parent is not theirs.
FAMILY = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def stranger():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_it_is_found_by_its_record_and_ended(tmp_path):
    port = free_port()
    Service(tmp_path, "web", "web server").start([*SERVER, str(port)], f"http://127.0.0.1:{port}", os.environ, tmp_path)
    again = Service(tmp_path, "web", "web server")
    again.wait(lambda: listens(port))
    record = again.running()
    assert record.address == f"http://127.0.0.1:{port}"
    assert os.getsid(record.pid) == record.pid != os.getsid(0), "it does not end with the terminal"
    assert again.stop()
    assert processes.look(record.pid) is None
    assert not again.stop(), "nothing left to end"


def test_its_children_end_with_it_and_those_that_left_its_session_stay(tmp_path):
    service = Service(tmp_path, "family", "family")
    service.start([sys.executable, "-c", FAMILY], "", os.environ, tmp_path)
    service.wait(lambda: len(service.log.read_text().split()) == 2)
    child, emigrant = map(int, service.log.read_text().split())
    # Even where the leader was killed before, its children are found.
    os.kill(service.running().pid, signal.SIGKILL)
    while service.running():
        time.sleep(0.05)
    assert service.stop()
    assert processes.look(child) is None
    assert processes.look(emigrant) is not None
    os.kill(emigrant, signal.SIGKILL)


@pytest.mark.parametrize("born_then_too", [False, True])
def test_a_number_used_again_is_not_killed(tmp_path, stranger, born_then_too):
    service = Service(tmp_path, "old", "old server")
    service.start([sys.executable, "-c", "import time; time.sleep(600)"], "", os.environ, tmp_path)
    record = service.running()
    assert service.stop()
    born = processes.look(stranger.pid).born if born_then_too else record.born
    saved = asdict(replace(record, pid=stranger.pid, born=born))
    (tmp_path / "old.json").write_text(json.dumps(saved))
    assert service.running() is None
    assert not service.stop()
    assert stranger.poll() is None


def test_one_that_dies_at_once_is_quoted(tmp_path):
    service = Service(tmp_path, "sick", "sick server")
    (tmp_path / "sick.log").write_text("words of an earlier one\n")
    code = "import sys; sys.exit('the database is locked')"
    service.start([sys.executable, "-c", code], "", os.environ, tmp_path)
    with pytest.raises(EnvironmentCheckError, match=r"sick server ended.*\n.*the database is locked") as refused:
        service.wait(lambda: False)
    assert "earlier" not in str(refused.value)
    assert service.running() is None


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with one deployment; nothing of the developer's own Prefect or MLflow is seen."""
    text = "deployments: [{name: geo3k, entrypoint: 'flows.dapo:dapo', work_pool: {name: dapo}}]\n"
    (tmp_path / "prefect.yaml").write_text(text)
    for name in [n for n in os.environ if n.startswith(("PREFECT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_port_of_another_program_is_refused_with_the_way_round_it(project, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
        with pytest.raises(EnvironmentCheckError, match=f"port {port} is taken.*PREFECT_API_URL=.* dapo up"):
            up.Stack(project, print).up(free_port())
    assert not list((project / "runs" / ".up").glob("*.json")), "nothing was started"


def test_mlflows_port_is_looked_at_before_anything_starts(project, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentCheckError, match=f"port {port} is taken.*--mlflow-port {port + 1}"):
            up.Stack(project, print).up(port)
    assert not list((project / "runs" / ".up").glob("*.json"))


def test_a_server_elsewhere_is_not_replaced(project, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://192.0.2.1:4200/api")
    with pytest.raises(EnvironmentCheckError, match=r"no Prefect server answers at http://192\.0\.2\.1"):
        up.Stack(project, print).up(free_port())


def test_without_a_project_the_packages_files_are_laid_out(tmp_path, monkeypatch):
    shipped, here, said = tmp_path / "share" / "dapo", tmp_path / "here", []
    (shipped / "configs").mkdir(parents=True)
    for name in ("prefect.yaml", "prefect.toml", "configs/geo3k_tiny.yaml"):
        (shipped / name).write_text(name)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(up.dapo, "__file__", str(tmp_path / "site-packages" / "dapo" / "__init__.py"))
    monkeypatch.setattr(up.sysconfig, "get_path", lambda which: str(tmp_path))
    assert up.project_folder(said.append) == here
    assert (here / "configs" / "geo3k_tiny.yaml").read_text() == "configs/geo3k_tiny.yaml"
    assert "were written" in said[0]
    assert up.project_folder(said.append) == here
    assert len(said) == 1
    (here / "prefect.yaml").unlink()
    (shipped / "prefect.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no prefect\.yaml in"):
        up.project_folder(said.append)


def test_a_ray_in_use_that_does_not_answer_ends_only_when_that_is_asked_for(project, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    said = []
    stack = up.Stack(project, said.append)
    mark = f"dapo-test-{os.getpid()}"
    ray = subprocess.Popen([sys.executable, "-c", FAMILY, mark], stdout=subprocess.PIPE, text=True)
    children = list(map(int, ray.stdout.readline().split()))
    state = stack.runs / ".ray"
    state.mkdir(parents=True)
    head = LocalHead(f"http://127.0.0.1:{free_port()}", mark, str(project / "ray"), (os.getpid(),))
    (state / "head.json").write_text(json.dumps(asdict(head)))
    (state / "token").write_text("secret")
    try:
        down(stack, stop_runs=False, end_ray=False, wait_s=1)
        assert ray.poll() is None
        assert said[-1] == f"Ray: process {os.getpid()} uses it, it stays"
        down(stack, stop_runs=False, end_ray=True, wait_s=1)
        assert ray.wait(10) == -signal.SIGTERM
        assert not [pid for pid in children if processes.look(pid)]
        assert said[-1] == "Ray: ended"
        said.clear()
        down(stack, stop_runs=False, end_ray=True, wait_s=1)
        assert not [words for words in said if "Ray" in words]
    finally:
        ray.kill()
