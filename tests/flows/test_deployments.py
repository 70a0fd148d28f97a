"""prefect.yaml and prefect.toml: Prefect ignores misspelt keys, so they are checked here."""

import inspect
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WHOLE = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {f"{d['entrypoint'].partition(':')[2]}/{d['name']}": d for d in WHOLE["deployments"]}
ASKED = {"runs"}
"""Parameters that only whoever starts the run can know: the form asks for them."""


def keys(model):
    return set(model.model_fields) | {f.alias for f in model.model_fields.values() if f.alias}


def test_no_key_is_misspelt():
    from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, WorkPoolConfig

    assert set(WHOLE) - keys(PrefectYamlModel) == {"definitions"}
    for name, deployment in DEPLOYMENTS.items():
        assert set(deployment) <= keys(DeploymentConfig), name
        assert set(deployment["work_pool"]) <= keys(WorkPoolConfig), name


def test_promised_deployments_are_there():
    assert {"dapo/geo3k", "dapo/geo3k-gpu", "dapo/geo3k-tiny"} <= set(DEPLOYMENTS)
    assert {"retrain/geo3k-weekly", "evaluate/geo3k", "compare/experiments"} <= set(DEPLOYMENTS)


def test_schedules_wait_until_somebody_switches_them_on():
    schedules = [schedule for d in DEPLOYMENTS.values() for schedule in d.get("schedules", ())]
    assert schedules
    assert not [schedule for schedule in schedules if schedule["active"]]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_entrypoint_is_a_module_and_takes_the_parameters(name, monkeypatch):
    from prefect.utilities.importtools import import_object

    monkeypatch.chdir(ROOT)
    deployment = DEPLOYMENTS[name]
    assert "/" not in deployment["entrypoint"], "a path would put flows/ on sys.path, where dapo.py hides the package"
    flow = import_object(deployment["entrypoint"])
    given = deployment.get("parameters", {})
    required = {n for n, p in inspect.signature(flow.fn).parameters.items() if p.default is p.empty}
    assert required - set(given) <= ASKED
    flow.validate_parameters({key: [] for key in required & ASKED} | given)
    for schedule in deployment.get("schedules", ()):
        flow.validate_parameters(given | schedule["parameters"])
    if "config_path" in given:
        assert (ROOT / given["config_path"]).is_file()


def test_a_stopped_worker_does_not_stop_the_flow():
    for deployment in DEPLOYMENTS.values():
        assert deployment["work_pool"]["job_variables"]["stream_output"] is False
        # A lease lost in an outage of the server would kill a long run.
        assert "concurrency_limit" not in deployment


def test_form_in_the_ui_has_bounds_and_descriptions():
    from prefect.utilities.callables import parameter_schema

    from flows.dapo import dapo

    schema = parameter_schema(dapo).model_dump()
    train = schema["definitions"]["TrainConfig"]["properties"]
    assert train["steps"]["minimum"] == 1
    assert "passes over the prompts" in train["epochs"]["description"]
    assert set(schema["properties"]) == {"config_path", "overrides", "config"}


def test_settings_phone_nobody():
    settings = tomllib.loads((ROOT / "prefect.toml").read_text())
    assert settings["server"]["analytics_enabled"] is False
    env = WHOLE["definitions"]["work_pool"]["job_variables"]["env"]
    from dapo.runtime.telemetry import TELEMETRY_OFF

    assert {k: v for k, v in env.items() if not k.startswith("PREFECT_FLOWS_")} == {
        k: v for k, v in TELEMETRY_OFF.items() if k in env
    }


def test_lost_flow_runs_are_noticed_after_three_heartbeats():
    from prefect.automations import Automation

    lost = Automation.model_validate(yaml.safe_load((ROOT / "automations.yaml").read_text()))
    every = int(WHOLE["definitions"]["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert lost.trigger.within.total_seconds() == 3 * every
    assert lost.actions[0].state == "CRASHED"
