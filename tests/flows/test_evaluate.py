"""The flows `evaluate` and `compare` through Prefect's engine, with a real engine and a model of random weights."""

import contextvars
import json
import threading
import time
from pathlib import Path
from uuid import UUID

import pytest

from dapo.config import io
from dapo.errors import ConfigError
from dapo.eval.evaluate import EvaluationFolder
from dapo.observe.shipper import connect, tracking_uri
from dapo.runtime import cluster
from tests.flows.test_ray_job import job_of, make_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_api")]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    config = io.validate(
        {
            "name": "letters",
            "device": "cpu",
            "run_root": str(root / "runs"),
            "data": {
                "source": {"kind": "synthetic", "train": 8, "validation": 8, "test": 8},
                "instruction": "",
                "max_prompt_tokens": 64,
                "cache_dir": str(root / "cache"),
            },
            "model": {"source": {"kind": "tiny", "warmup_steps": 0}, "compute_dtype": "float32"},
            "batch": {"max_response_tokens": 6, "tokens_per_pack": 2048},
            "reward": {"function": "tests.flows.easy_reward:begins_with_a_letter"},
            "validation": {"samples": 2, "top_p": 1.0},
        }
    )
    yield config
    assert cluster.stop_local(config) == []


def evaluate(config, **options):
    from flows.evaluate import evaluate as flow

    return EvaluationFolder(Path(flow(config=config, **options)))


def test_two_evaluations_are_recorded_and_compared(config):
    from flows.compare import compare

    one, other = evaluate(config), evaluate(config, overrides={"seed": 7})
    assert one.root != other.root
    client = connect(tracking_uri(config))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.`dapo.kind` = 'evaluation'")
    assert {run.data.tags["dapo.evaluation"] for run in runs} == {one.id, other.id}
    assert {run.data.tags["dapo.model"] for run in runs} == {"base"}
    accuracy = one.read_metrics()["metrics"]["val/accuracy"]
    assert accuracy in [run.data.metrics["val/accuracy"] for run in runs]

    page = compare([run.info.run_id for run in runs], tracking_uri(config), config.run_root)
    assert "8</td>" in Path(page).read_text()
    with pytest.raises(ConfigError, match="at least two runs, got 1"):
        compare(["one"], tracking_uri(config), config.run_root)


def test_command_and_flow_measure_as_one_and_an_outage_of_mlflow_costs_nothing(config, tmp_path, capsys):
    from dapo.cli import main

    measured = evaluate(config)
    io.save(config, tmp_path / "config.yaml")
    words = ["evaluate", "base", str(tmp_path / "config.yaml"), "mlflow.tracking_uri=http://127.0.0.1:9"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "measured before: the same weights answered the same questions" in out
    assert f"answers    {measured.page}\n  MLflow     did not take the evaluation (" in out
    away = io.override(config, {"mlflow.tracking_uri": "http://127.0.0.1:9"})
    assert evaluate(away).root == measured.root


@pytest.mark.nightly
def test_several_devices_answer_as_one_does(config):
    """On a Ray of our own, with two workers; sampling depends on (seed, prompt, sample) alone."""
    two = evaluate(io.override(config, {"model.parallel.world_size": 2, "name": "two", "seed": 3}))
    one = evaluate(io.override(config, {"name": "one", "seed": 3}), data=two.read_inputs()["data"])
    assert two.root == one.root, "how many devices measure is no part of the question"
    again = json.loads(two.metrics.read_text())
    for path in (one.metrics, one.answers, one.results):
        path.unlink()
    alone = evaluate(io.override(config, {"name": "one", "seed": 3}))
    assert alone.root == two.root
    assert alone.read_metrics()["estimates"] == again["estimates"]


def test_an_evaluation_waits_for_its_device_and_says_for_whom(config, monkeypatch):
    """CPUs stand for the device. One alone needs no cluster, but on the Ray that runs here somebody may train."""
    from dapo.runtime import evaluation

    local = cluster.connect(config)
    monkeypatch.setattr(evaluation, "takes_turn", lambda config, found: found == local)
    first = evaluate(io.override(config, {"seed": 11}))
    before = first.read_metrics()["estimates"]
    for path in (first.metrics, first.answers, first.results):
        path.unlink()
    training = job_of(local, *make_run(Path(config.run_root), "trains", STANDIN_SECONDS="600"))
    training.start()
    said = []

    def progress(done, total, words):
        said.append(words)
        if words.startswith("waits for"):
            training.end()

    assert evaluation.evaluate(first, progress)["estimates"] == before
    assert said[0].startswith(f"waits for {training.run.id} (job {training.id})")
    assert said[-1] == "prompts"


def test_a_cancelled_evaluation_gives_its_devices_back(config):
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    from flows.evaluate import evaluate as flow

    def evaluations():
        head = cluster.find_local(config)
        jobs = head.jobs() if head else []
        return [job for job in jobs if job["metadata"]["kind"] == "evaluation" and job["status"] == "RUNNING"]

    def cancel():
        while not (jobs := evaluations()):
            time.sleep(0.2)
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(jobs[0]["metadata"]["owner"]), Cancelling(), force=True)

    canceller = threading.Thread(target=contextvars.copy_context().run, args=(cancel,))
    canceller.start()
    # So many answers that it would be measuring for long.
    two = io.override(config, {"model.parallel.world_size": 2, "seed": 5, "validation.samples": 4096})
    state = flow(config=two, return_state=True)
    canceller.join()
    assert state.is_cancelled(), state
    end_at = time.monotonic() + 30
    while evaluations():
        assert time.monotonic() < end_at
        time.sleep(0.2)


def test_a_lasting_failure_is_not_tried_again(config, capsys):
    from flows.compare import compare

    with pytest.raises(ConfigError, match="is no run in this MLflow store"):
        compare(["neither", "nor"], tracking_uri(config), config.run_root)
    assert "Retry" not in capsys.readouterr().err
