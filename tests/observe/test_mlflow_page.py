"""The link from Prefect's pages to MLflow's."""

import json

import pytest

from dapo.observe.mlflow_page import page
from dapo.observe.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "one-1234")
    folder.root.mkdir(parents=True)
    return folder


def shipped_to(folder, store):
    folder.mlflow.write_text(json.dumps({"offset": 9, "tracking_uri": store, "run_id": "abc", "experiment_id": "1"}))


def server_over(folder, store):
    state = folder.root.parent / ".up"
    state.mkdir()
    command = ["python", "-m", "mlflow", "server", "--backend-store-uri", store]
    (state / "mlflow.json").write_text(json.dumps({"address": "http://127.0.0.1:5000", "command": command}))


def test_run_in_a_server_s_store_is_found_at_that_server(folder):
    shipped_to(folder, "http://mlflow:80/")
    assert page(folder) == "http://mlflow:80/#/experiments/1/runs/abc"


def test_run_in_the_database_is_found_at_the_server_that_shows_it(folder):
    store = f"sqlite:///{folder.root.parent / 'mlflow.db'}"
    shipped_to(folder, store)
    assert page(folder) is None
    server_over(folder, store)
    assert page(folder) == "http://127.0.0.1:5000/#/experiments/1/runs/abc"


def test_server_of_another_database_has_no_page_of_it(folder):
    shipped_to(folder, "sqlite:////elsewhere/mlflow.db")
    server_over(folder, f"sqlite:///{folder.root.parent / 'mlflow.db'}")
    assert page(folder) is None


def test_before_anything_was_shipped_there_is_no_page(folder):
    server_over(folder, "sqlite:///any.db")
    assert page(folder) is None
