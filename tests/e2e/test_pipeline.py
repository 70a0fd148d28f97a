"""The whole product, from nothing to a better-documented model, with nothing of ours replaced."""

import json
import os
import re
import signal
import time

import mlflow
import psutil
import pytest
import torch

from dapo import torchvision_cpu
from dapo.observe.shipper import tracking_uri
from tests.e2e.pipeline import Pipeline, processes_with

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One small run on two ranks, and what it printed."""
    pipeline = Pipeline(tmp_path_factory.mktemp("pipeline"), ("model.parallel.world_size=2",))
    return pipeline, pipeline.run()


def test_it_says_what_it_does_and_where_everything_is(done):
    pipeline, printed = done
    for line in ("step 1/2", "step 2/2", "validation at step 0", "Held-out accuracy:", "left 0:"):
        assert line in printed
    for place in (pipeline.folder.report, pipeline.folder.checkpoint(2)):
        assert str(place) in printed
        assert place.exists()


def test_the_journal_has_every_step_validation_and_checkpoint_once(done):
    pipeline, _ = done
    assert [e.step for e in pipeline.events("step")] == [1, 2]
    assert [e.step for e in pipeline.events("validation")] == [0, 1, 2]
    assert [e.step for e in pipeline.events("checkpoint")] == [1, 2]
    assert pipeline.events("ended")[-1].data["status"] == "finished"
    for event in pipeline.events("step"):
        metrics = event.data["metrics"]
        assert metrics["train/max_ratio_error"] == 0
        assert metrics["engine/gap_mean"] < 1e-4
        assert metrics["train/grad_norm"] > 0


def test_mlflow_has_the_run_with_its_models_and_data(done):
    pipeline, _ = done
    client = mlflow.MlflowClient(tracking_uri(pipeline.config))
    experiment = client.get_experiment_by_name("dapo")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "val/accuracy")) == 3
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 2
    assert run.inputs.dataset_inputs
    assert len(client.search_logged_models([experiment.experiment_id])) == 2
    assert "report.html" in {a.path for a in client.list_artifacts(run.info.run_id)}


def test_plain_transformers_loads_the_checkpoint(done):
    pipeline, _ = done
    torchvision_cpu.install()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = pipeline.folder.checkpoint(2) / "hf"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    ids = AutoProcessor.from_pretrained(folder).tokenizer("side=3 area?", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_nothing_is_left_running(done):
    pipeline, _ = done
    deadline = time.monotonic() + 15
    while (left := processes_with(str(pipeline.home))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == {}


def test_a_second_run_skips_what_is_done_and_says_why(done):
    pipeline, _ = done
    before = pipeline.folder.journal.read_text()
    pipeline.log.unlink()
    started = time.monotonic()
    printed = pipeline.run()
    assert time.monotonic() - started < 90
    assert "skipped" in printed
    assert "Held-out accuracy:" in printed
    assert pipeline.folder.journal.read_text() == before


@pytest.mark.slow
def test_killed_in_mid_run_it_continues_from_its_last_checkpoint(tmp_path):
    """SIGKILL to the job, its workers, the flow and the server at once, as when the machine dies."""
    pipeline = Pipeline(tmp_path, ("train.steps=6", "train.save_freq=2", "train.test_freq=3")).start()
    pipeline.wait_for(lambda: any(e.step >= 3 for e in pipeline.events("step")))
    for pid in processes_with(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)
    pipeline.process.wait(30)
    reached = max(e.step for e in pipeline.events("step"))
    assert 3 <= reached < 6
    pipeline.run()
    assert [e.step for e in pipeline.events("step")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in pipeline.events("validation")] == [0, 3, 6]
    assert pipeline.events("ended")[-1].data["status"] == "finished"
    client = mlflow.MlflowClient(tracking_uri(pipeline.config))
    [run] = client.search_runs([client.get_experiment_by_name("dapo").experiment_id])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_killed_job_is_started_again_while_the_flow_goes_on(tmp_path):
    pipeline = Pipeline(tmp_path, ("train.steps=4",)).start()
    pipeline.wait_for(lambda: pipeline.events("checkpoint"))
    for pid, command in processes_with(str(pipeline.folder.root)).items():
        if "dapo.runtime.job" in command:
            os.kill(pid, signal.SIGKILL)
    pipeline.finish()
    assert len(pipeline.events("started")) == 2
    assert [e.step for e in pipeline.events("step")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_same_run_works_with_vllm(tmp_path):
    pipeline = Pipeline(tmp_path, ("rollout.engine=vllm", "rollout.kv_cache_mib=64"))
    pipeline.run(timeout_s=600)
    for event in pipeline.events("step"):
        assert event.data["metrics"]["engine/gap_mean"] < 1e-4
    assert json.loads(pipeline.folder.mlflow.read_text())["run_id"]


@pytest.mark.nightly
@pytest.mark.slow
def test_an_engine_in_a_process_of_its_own_that_is_killed_is_replaced_while_its_trainer_lives_on(tmp_path):
    own = ("rollout.engine=vllm", "rollout.separate_process=true", "rollout.kv_cache_mib=64", "rollout.probe_every=1")
    pipeline = Pipeline(tmp_path, (*own, "train.steps=4", "train.test_freq=0", "train.save_freq=0")).start()
    pipeline.wait_for(lambda: pipeline.events("step"), timeout_s=400)
    workers = [int(pid) for pid in re.findall(r"worker {.*'pid': (\d+)", pipeline.folder.job_log.read_text())]
    children = [child for pid in workers for child in psutil.Process(pid).children()]
    core, *_ = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    core.kill()
    pipeline.finish()
    assert len(pipeline.events("started")) == 1, "the job itself went on"
    assert [e.data["name"] for e in pipeline.events("alarm")].count("engine_restarted") == 1
    assert [e.step for e in pipeline.events("step")] == [1, 2, 3, 4]
    for event in pipeline.events("step"):
        assert event.data["metrics"]["engine/probe_mean"] < 1e-4


@pytest.mark.slow
def test_engines_beside_the_trainer_generate_ahead_and_one_that_is_killed_is_replaced(tmp_path):
    beside = ("model.parallel.world_size=1", "rollout.devices=1", "rollout.ahead=true", "rollout.probe_every=1")
    pipeline = Pipeline(tmp_path, (*beside, "train.steps=6", "train.test_freq=0", "train.save_freq=0")).start()
    pipeline.wait_for(lambda: pipeline.events("step"))
    _, generator = re.findall(r"worker {.*'pid': (\d+)", pipeline.folder.job_log.read_text())
    os.kill(int(generator), signal.SIGKILL)
    pipeline.finish()
    assert len(pipeline.events("started")) == 1, "the job itself went on"
    assert [e.data["name"] for e in pipeline.events("alarm")].count("engine_restarted") == 1
    assert [e.step for e in pipeline.events("step")] == [1, 2, 3, 4, 5, 6]
    for event in pipeline.events("step"):
        assert event.data["metrics"]["engine/probe_mean"] < 1e-4
