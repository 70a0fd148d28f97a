"""Flow runs without a process, and task runs that the server lost, on a real Prefect server."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelling, Crashed, Pending, Running

from dapo.config import io
from dapo.errors import ConfigError
from dapo.observe.journal import follow
from dapo.observe.run_folder import RunFolder
from dapo.runtime import processes
from flows import recovery
from tests.flows.conftest import standin_tree
from tests.flows.standin_job import Journal, save, validate

pytestmark = pytest.mark.usefixtures("prefect_api")


@flow(name="any")
def any_flow() -> None:
    """Stands for the flows that call `begin`."""


def running(client, attempt=1, deployment=None, state=Running):
    run = client.create_flow_run_from_deployment(deployment) if deployment else client.create_flow_run(any_flow)
    for _ in range(attempt):
        client.set_flow_run_state(run.id, Pending(), force=True)
        client.set_flow_run_state(run.id, Running(), force=True)
    if state is not Running:
        client.set_flow_run_state(run.id, state(), force=True)
    return run.id


def place(process, attempt=1, host=None):
    words = (host or socket.gethostname(), recovery._boot(), process.pid, process.born, attempt)
    return {recovery.LABEL: ":".join(map(str, words))}


@pytest.fixture
def dead():
    child = subprocess.Popen(["sleep", "60"])
    seen = processes.look(child.pid)
    child.kill()
    child.wait()
    return seen


def test_flow_run_whose_process_is_gone_is_crashed_and_only_that(dead):
    living = processes.look(os.getpid())
    with get_client(sync_client=True) as client:
        cases = {
            "gone": (running(client), place(dead)),
            "lives": (running(client), place(living)),
            "number used again": (running(client), place(processes.Process(living.pid, 0, 0, living.born - 1))),
            "another machine's": (running(client), place(dead, host="elsewhere")),
            "new attempt": (running(client, attempt=2), place(dead, attempt=1)),
            "cancelled": (running(client, state=Cancelling), place(dead)),
            "says nothing": (running(client), {}),
        }
        for one, labels in cases.values():
            client.update_flow_run_labels(one, labels)
        assert len(recovery.sweep()) == 3
        states = {name: client.read_flow_run(one).state.name for name, (one, _) in cases.items()}
    ended = {"gone": "Crashed", "number used again": "Crashed", "cancelled": "Cancelled"}
    assert states == dict.fromkeys(cases, "Running") | ended


@contextlib.contextmanager
def process_of(run, *words):
    """With the flow run's id in its environment, as Prefect starts it; and `words` on its command line."""
    env = {**os.environ, "PREFECT__FLOW_RUN_ID": str(run)}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *words], env=env)
    try:
        while not processes.carries(child.pid, str(run)):
            time.sleep(0.01)
        yield child.pid
    finally:
        child.kill()
        child.wait()


def test_flow_run_killed_before_it_said_a_word_is_crashed_and_only_that(dead):
    """Its worker's name says on which machine it was; Prefect's own number of the process may be anybody's by now."""
    here = socket.gethostname()
    worker = {"prefect.worker.name": f"{here}:project", "prefect.worker.type": "process"}
    with get_client(sync_client=True) as client, contextlib.ExitStack() as stack:
        cases = {
            "gone": (running(client), worker, dead.pid),
            "cancelled": (running(client, state=Cancelling), worker, dead.pid),
            "number used again": (running(client), worker, os.getpid()),
            "an earlier attempt is recorded": (running(client, attempt=2), worker | place(dead), dead.pid),
            "only its Ray lives": (running(client), worker, dead.pid),
            "lives": (running(client), worker, None),
            "lives, number of the attempt before": (running(client, attempt=2), worker, dead.pid),
            "suspended, goes on elsewhere": (running(client), worker | place(dead), dead.pid),
            "another machine's": (running(client), worker | {"prefect.worker.name": "elsewhere:project"}, dead.pid),
            "nobody knows whose": (running(client), worker | {"prefect.worker.name": f"{here}-1"}, dead.pid),
            "in a container": (running(client), worker | {"prefect.worker.type": "docker"}, dead.pid),
        }
        for name, (one, labels, pid) in cases.items():
            if name == "lives":
                pid = stack.enter_context(process_of(one))
            elif name == "only its Ray lives":
                stack.enter_context(process_of(one, "gcs_server"))
            elif name in ("lives, number of the attempt before", "suspended, goes on elsewhere"):
                stack.enter_context(process_of(one, "prefect.engine"))
            client.update_flow_run_labels(one, labels)
            client.update_flow_run(one, infrastructure_pid=str(pid))
        recovery.sweep()
        states = {name: client.read_flow_run(one).state.name for name, (one, *_) in cases.items()}
    ended = {"gone", "number used again", "an earlier attempt is recorded", "only its Ray lives"}
    assert states == dict.fromkeys(cases, "Running") | dict.fromkeys(ended, "Crashed") | {"cancelled": "Cancelled"}


def test_flow_runs_inside_end_with_the_one_around_them(dead):
    inside = []

    @flow(name="inner")
    def inner():
        inside.append(UUID(this_run.id))

    @flow(name="outer")
    def outer():
        inner()
        return UUID(this_run.id)

    around = outer()
    with get_client(sync_client=True) as client:
        for one in (around, *inside):
            client.set_flow_run_state(one, Running(), force=True)
        attempt = client.read_flow_run(around).run_count
        client.update_flow_run_labels(around, place(dead, attempt=attempt))
        recovery.sweep()
        assert [client.read_flow_run(one).state.name for one in (around, *inside)] == ["Crashed", "Crashed"]


def test_flow_run_of_a_deployment_comes_back_so_many_times(dead):
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(any_flow), "any", entrypoint="any:any")
        first, last = (running(client, attempt=n, deployment=deployment) for n in (1, recovery.COMEBACKS + 1))
        client.update_flow_run_labels(first, place(dead))
        client.update_flow_run_labels(last, place(dead, attempt=recovery.COMEBACKS + 1))
        recovery.sweep()
        assert client.read_flow_run(first).state.name == "AwaitingRetry"
        assert client.read_flow_run(last).state.name == "Crashed"


def test_flow_run_that_was_retried_meanwhile_does_not_come_back_twice():
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(any_flow), "any", entrypoint="any:any")
        retried, crashed = (running(client, deployment=deployment, state=state) for state in (Pending, Crashed))
        for one in (retried, crashed):
            recovery.come_back(any_flow, client.read_flow_run(one), Crashed())
        assert client.read_flow_run(retried).state.name == "Pending"
        assert client.read_flow_run(crashed).state.name == "AwaitingRetry"


@pytest.mark.parametrize("name", ["compare", "evaluate"])
def test_flows_without_a_job_say_where_their_process_is_and_come_back_too(name, tmp_path):
    """Each is ended by its parameters, right after it began."""
    config = io.validate(standin_tree(tmp_path, "any"))
    wrong = {
        "compare": {"runs": ["one"]},
        "evaluate": {"config": config, "model": "no such model", "data": str(tmp_path)},
    }
    one = flow_of(name)
    assert one.on_crashed_hooks == [recovery.come_back]
    state = one(**wrong[name], return_state=True)
    assert state.is_failed()
    with pytest.raises(ConfigError):
        state.result()
    with get_client(sync_client=True) as client:
        label = client.read_flow_run(state.state_details.flow_run_id).labels[recovery.LABEL]
    assert label == place(processes.look(os.getpid()))[recovery.LABEL]


def test_cancelled_flow_run_without_a_process_gets_its_flow_s_hook(dead, monkeypatch):
    called = []
    monkeypatch.setitem(recovery.HOOKS, "any", lambda flow, run, state: called.append((run.id, state.name)))
    with get_client(sync_client=True) as client:
        run = running(client, state=Cancelling)
        client.update_flow_run_labels(run, place(dead))
    recovery.sweep()
    assert called == [(run, "Cancelling")]
    jobs = ("dapo", "retrain", "evaluate")
    assert {name: flow_of(name).on_cancellation_hooks for name in jobs} == {n: [recovery.HOOKS[n]] for n in jobs}


def flow_of(name):
    return getattr(importlib.import_module(f"flows.{name}"), name)


@pytest.fixture
def told_run(tmp_path):
    """A run's folder with validations at 0, 2, 4 and checkpoints at 2, 4, all in MLflow."""
    config = io.validate(standin_tree(tmp_path, "recorded"))
    folder = RunFolder.of(config)
    folder.root.mkdir(parents=True)
    folder.manifest.write_text("{}")
    journal = Journal(folder.journal)
    for step in (0, 2, 4):
        validate(journal, folder, step)
        if step:
            save(journal, folder, step)
    folder.mlflow.write_text(json.dumps({"offset": folder.journal.stat().st_size, "tracking_uri": "x", "run_id": "y"}))
    return folder, config


def follower(folder, config, lose=()):
    """A flow that reports everything to Prefect; task runs named in `lose` vanish from the server before it asks."""
    from tasks.journal_relay import JournalRelay

    @flow(name="follower")
    def follow_it():
        records = JournalRelay(folder, config)
        for event, offset in follow(folder.journal, records.offset):
            records.take(event, offset)
        with get_client(sync_client=True) as client:
            for name in lose:
                _remove(client, this_run.id, name)
        records.finish()
        return this_run.id

    return follow_it()


def _remove(client, flow_run_id, name):
    end_at = time.monotonic() + 60
    while time.monotonic() < end_at:
        for run in task_runs(client, flow_run_id):
            if run.name == name and run.state.is_final():
                client._client.delete(f"/task_runs/{run.id}").raise_for_status()
                return
        time.sleep(0.2)
    raise AssertionError(f"{name} was never recorded")


def task_runs(client, flow_run_id):
    return client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))


def completed(flow_run_id):
    with get_client(sync_client=True) as client:
        return sorted(run.name for run in task_runs(client, flow_run_id) if run.state.is_completed())


EVERYTHING = [*(f"log_checkpoint-step-{s}" for s in (2, 4)), *(f"record_validation-step-{s}" for s in (0, 2, 4))]


def test_what_the_server_lost_is_told_again_and_what_it_has_is_not(told_run, monkeypatch):
    monkeypatch.setattr("tasks.journal_relay._LOST_S", 1.0)
    folder, config = told_run
    first = follower(folder, config, lose=["record_validation-step-2"])
    assert completed(first) == EVERYTHING
    remembered = json.loads((folder.root / "prefect.json").read_text())
    assert remembered["offset"] == folder.journal.stat().st_size
    # Killed before the server's word was written down, the next flow run looks for itself.
    (folder.root / "prefect.json").write_text(json.dumps(remembered | {"offset": 0}))
    assert completed(follower(folder, config)) == []
