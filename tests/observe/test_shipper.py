"""Journal to a real MLflow database: everything once, also when the shipper is killed or MLflow goes away."""

import mlflow
import pytest

from dapo.observe.report import write_plots
from dapo.observe.shipper import Shipper, log_artifacts, tracking_uri
from tests.observe import run_folder
from tests.observe.run_folder import STEPS


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder, config, journal = run_folder.make(tmp_path_factory.mktemp("shipper"))
    shipper = Shipper(folder, config)
    assert shipper.ship() == len(folder.journal.read_text().splitlines())
    # Killed before it could remember: the next one finds what is there and adds nothing.
    first = shipper.run_id
    folder.mlflow.unlink()
    journal.append("ended", STEPS, status="finished", reason="done")
    again = Shipper(folder, config)
    again.ship()
    assert again.run_id == first
    return folder, config, mlflow.MlflowClient(again.uri), first


def test_every_metric_is_there_exactly_once(shipped):
    _, _, client, run_id = shipped
    for name, points in {"train/entropy": STEPS, "val/accuracy": 2, "time/step": STEPS}.items():
        assert len(client.get_metric_history(run_id, name)) == points, name


def test_run_says_what_it_was_made_from(shipped):
    folder, config, client, run_id = shipped
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["algorithm.loss.clip.high"] == "0.28"
    assert run.data.tags["package.torch"].startswith("2.")
    assert "alarm.entropy_collapse" in run.data.tags
    assert run.inputs.dataset_inputs[0].dataset.digest
    artifacts = {a.path for a in client.list_artifacts(run_id)}
    assert {"config.yaml", "manifest.json", "validation"} <= artifacts
    log_artifacts(folder, config, write_plots(folder), under="plots")
    assert "plots/entropy.svg" in {a.path for a in client.list_artifacts(run_id, "plots")}
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_validation_table_has_pictures(shipped):
    _, _, client, run_id = shipped
    paths = {a.path for a in client.list_artifacts(run_id, "validation")}
    assert {"validation/step-000000.json", f"validation/step-{STEPS:06d}.json"} <= paths
    table = mlflow.artifacts.load_dict(f"{client.get_run(run_id).info.artifact_uri}/validation/step-000000.json")
    assert "image" in table["columns"]


def test_a_checkpoint_is_a_logged_model_by_reference_with_its_metrics(shipped):
    folder, _, client, run_id = shipped
    [model] = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert model.tags["checkpoint.uri"] == (folder.checkpoint(STEPS) / "hf").as_uri()
    assert {m.key: m.value for m in model.metrics} == {"val/accuracy": 0.75}


def test_training_goes_on_and_nothing_is_lost_while_mlflow_is_away(tmp_path):
    folder, config, journal = run_folder.make(tmp_path, mlflow={"tracking_uri": "http://127.0.0.1:9"})
    shipper = Shipper(folder, config).start()
    journal.append("ended", STEPS, status="finished", reason="done")
    assert shipper.close(wait_s=30) is False
    store = config.mlflow.model_copy(update={"tracking_uri": f"sqlite:///{tmp_path}/back.db"})
    back = Shipper(folder, config.model_copy(update={"mlflow": store}))
    back.ship()
    client = mlflow.MlflowClient(back.uri)
    assert len(client.get_metric_history(back.run_id, "train/entropy")) == STEPS


def test_one_run_s_store_is_not_the_default_of_the_next(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder, config, _ = run_folder.make(tmp_path / "one")
    Shipper(folder, config).ship()
    _, other, _ = run_folder.make(tmp_path / "two")
    assert tracking_uri(other) == f"sqlite:///{tmp_path / 'two' / 'runs' / 'mlflow.db'}"
