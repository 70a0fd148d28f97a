"""The flow `dapo` through Prefect's engine, on a real local Ray, with a stand-in for the training itself."""

import contextvars
import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from dapo.config import io
from dapo.errors import EnvironmentCheckError, TrainingError
from dapo.observe.journal import read
from dapo.observe.run_folder import RunFolder
from dapo.runtime import cluster, ray_job
from tests.flows.conftest import HERE, standin_tree

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def root(shared, ray):
    return shared


@pytest.fixture(autouse=True)
def _standin(monkeypatch):
    defaults = ray_job.RayJob.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "entrypoint", (str(HERE / "standin_job.py"),))
    monkeypatch.setitem(defaults, "back_off_s", (0.1,))
    monkeypatch.setattr(ray_job, "STATUS_EVERY_S", 0.5)


def run(config, **options):
    from flows.dapo import dapo

    return dapo(config=config, return_state=True, **options)


def tasks_of(state):
    """Names and state names of a flow run's task runs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    flow_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        return {t.name: t.state_name for t in client.read_task_runs(flow_run_filter=flow_run)}


def test_validations_and_checkpoints_are_task_runs_and_finished_stages_are_skipped(root, capsys, caplog):
    config = io.validate(standin_tree(root, "whole"))
    state = run(config)
    assert state.result() == "finished"
    names = tasks_of(state)
    assert {n for n in names if n.startswith("record_validation")} == {f"record_validation-step-{s}" for s in (0, 2, 4)}
    assert {n for n in names if n.startswith("log_checkpoint")} == {f"log_checkpoint-step-{s}" for s in (2, 4)}
    stages = ["prepare_dataset-synthetic", "fetch_weights-tiny", "train-whole"]
    stages += ["validate_environment-machine", "validate_environment-inputs"]
    assert {names[stage] for stage in stages} == {"Completed"}
    folder = RunFolder.of(config)
    assert folder.report.is_file()
    inputs = json.loads(folder.inputs.read_text())
    assert io.load(folder.config) == config

    again = run(config)
    assert again.result() == "finished"
    names = tasks_of(again)
    assert names["prepare_dataset-synthetic"] == "Cached"
    assert names["fetch_weights-tiny"] == "Cached"
    assert not [n for n in names if n.startswith(("record_validation", "log_checkpoint", "find_cluster"))]
    # Prefect's loggers write to the console or pass on to the root, whichever test came first.
    output = capsys.readouterr().err + caplog.text
    assert "prepare_dataset skipped: the same configuration and code made" in output
    assert "fetch_weights skipped: the same configuration and code made" in output
    assert "skipped: whole-" in output

    # Prefect remembers a path; somebody removed what it leads to.
    shutil.rmtree(inputs["data"])
    assert run(config).result() == "finished"
    assert "is gone; it is made again" in capsys.readouterr().err + caplog.text
    assert (Path(inputs["data"]) / "train.parquet").is_file()


def test_more_steps_go_on_from_the_checkpoint_and_nothing_is_recorded_twice(root):
    config = io.validate(standin_tree(root, "longer"))
    assert run(config).result() == "finished"
    state = run(config, overrides={"train.steps": 6})
    assert state.result() == "finished"
    recorded = sorted(n for n in tasks_of(state) if n.startswith(("record_validation", "log_checkpoint")))
    assert recorded == ["log_checkpoint-step-6", "record_validation-step-6"]


@pytest.mark.slow
def test_run_from_the_beginning_puts_the_earlier_one_aside(root):
    config = io.validate(standin_tree(root, "anew"))
    assert run(config).result() == "finished"
    folder = RunFolder.of(config)
    first = folder.journal.read_text()
    again = run(config, overrides={"train.resume": "never"})
    assert again.result() == "finished"
    assert "record_validation-step-0" in tasks_of(again)
    (aside,) = folder.root.parent.glob(f"{folder.id}.before-*")
    assert (aside / "journal.jsonl").read_text() == first
    assert [e.data["attempt"] for e in read(folder.journal) if e.kind == "started"] == [1]
    # After a crash the job must go on, not begin once more.
    assert io.load(folder.config).train.resume == "auto"


@pytest.mark.slow
def test_run_from_the_beginning_goes_on_in_later_attempts_of_its_flow_run(root):
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow
    from prefect.states import Pending

    from flows.dapo import dapo

    tree = standin_tree(root, "anew-again", STANDIN_DIE_AT="3")
    tree["train"]["resume"], tree["ray"]["restarts"] = "never", 0
    config = io.validate(tree)
    states = []
    with get_client(sync_client=True) as client:
        one = client.create_flow_run(dapo, parameters={"config": config.model_dump(mode="json")}).id
        for _ in range(3):
            client.set_flow_run_state(one, Pending(), force=True)
            states.append(run_flow(dapo, client.read_flow_run(one), {"config": config}, return_type="state"))
    assert [state.name for state in states] == ["Failed", "Completed", "Completed"]
    folder = RunFolder.of(config)
    started = [(e.data["attempt"], e.step) for e in read(folder.journal) if e.kind == "started"]
    assert started == [(1, 0), (2, 2)], "the crashed run goes on, and the finished one is not trained again"
    assert not list(folder.root.parent.glob(f"{folder.id}.before-*"))


def test_failing_job_fails_the_flow_with_one_sentence(root):
    state = run(io.validate(standin_tree(root, "broken", STANDIN_FAIL_AT="2")))
    assert state.is_failed()
    with pytest.raises(TrainingError, match=r"the reward function is broken\. Log: "):
        state.result()


def test_training_that_gives_up_fails_with_its_reason_and_still_has_a_report(root):
    config = io.validate(standin_tree(root, "starving", STANDIN_STARVE_AT="3"))
    state = run(config)
    with pytest.raises(TrainingError, match=r"stopped at step 2: dynamic sampling found nothing\. Report: "):
        state.result()
    assert RunFolder.of(config).report.is_file()


def test_recipe_for_npus_is_refused_before_anything_is_fetched(root):
    state = run(io.load("configs/geo3k.yaml", {"run_root": str(root / "runs"), "data.cache_dir": str(root / "cache")}))
    with pytest.raises(EnvironmentCheckError, match=r"device=npu, and this machine has: "):
        state.result()
    assert set(tasks_of(state)) == {"validate_environment-machine"}


def test_job_found_running_is_followed_from_where_the_last_flow_stopped(root):
    config = io.validate(standin_tree(root, "attached", STANDIN_SECONDS="0.4"))
    config = io.override(config, {"train.steps": 8})
    from tasks.train import make_folder

    folder = make_folder(config, root, root)
    job = ray_job.RayJob(cluster.connect(config), folder, config)
    assert job.start()
    for event, offset in job.follow():
        if event.kind == "validation" and event.step == 2:
            (folder.root / "prefect.json").write_text(json.dumps({"offset": offset}))
            break
    names = tasks_of(run(config))
    validated = sorted(int(n.rpartition("-")[2]) for n in names if n.startswith("record_validation"))
    assert validated == [4, 6, 8]


@pytest.mark.slow
def test_more_steps_asked_of_a_running_job_are_done_when_it_ends(root):
    config = io.validate(standin_tree(root, "extended", STANDIN_SECONDS="0.4"))
    from tasks.train import make_folder

    folder = make_folder(config, root, root)
    assert ray_job.RayJob(cluster.connect(config), folder, config).start()
    while not folder.journal.exists():
        time.sleep(0.1)
    assert run(config, overrides={"train.steps": 6}).result() == "finished"
    started = [(e.data["attempt"], e.data["total_steps"]) for e in read(folder.journal) if e.kind == "started"]
    assert started == [(1, 4), (2, 6)]


def test_cancelled_flow_run_stops_its_job_with_a_checkpoint(root):
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    config = io.override(io.validate(standin_tree(root, "cancelled", STANDIN_SECONDS="0.3")), {"train.steps": 500})
    folder = RunFolder.of(config)

    def cancel():
        while not any(event.step == 2 for event in read(folder.journal)):
            time.sleep(0.1)
        with get_client(sync_client=True) as client:
            (ours,) = [r for r in client.read_flow_runs() if "-cancelled-" in r.name]
            client.set_flow_run_state(ours.id, Cancelling())

    canceller = threading.Thread(target=contextvars.copy_context().run, args=(cancel,))
    canceller.start()
    state = run(config)
    canceller.join()
    assert state.is_cancelled()
    last = list(read(folder.journal))[-1]
    assert last.data == {"status": "stopped", "reason": "the flow run was cancelled"}
    assert state.message == f"stopped at step {last.step} (the flow run was cancelled); run again to go on"
    assert folder.checkpoint(last.step).is_dir()
