"""Runs compared from a real MLflow database alone: their folders are removed before they are read."""

import json
from pathlib import Path

import pytest

from dapo.errors import ConfigError
from dapo.eval import results
from dapo.eval.compare import compare, course, differences, equal_points
from dapo.eval.comparison_page import markdown, write_comparison
from dapo.eval.evaluate import make_folder, measure
from dapo.eval.mlflow_records import log_evaluation
from dapo.eval.models import Model
from dapo.eval.runs import read_runs
from dapo.observe.shipper import connect, tracking_uri
from tests.eval.remembered import make_run
from tests.records import group


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    slow = make_run(root, "slow", steps=8, gain=0.01, seconds=36.0, responses=512, right=50)
    fast = make_run(
        root,
        "fast",
        steps=4,
        gain=0.04,
        seconds=18.0,
        responses=1024,
        right=80,
        model={"optimizer": {"lr": 5e-6}, "parallel": {"world_size": 2}},
    )
    client = connect(tracking_uri(slow[0]))
    return client, slow, fast, read_runs(client, ["slow", fast[1]])


def test_a_run_is_found_by_id_name_or_the_beginning_of_its_name(world):
    client, slow, fast, runs = world
    assert [r.id for r in runs] == [slow[1], fast[1]]
    assert [r.name.partition("-")[0] for r in runs] == ["slow", "fast"]
    with pytest.raises(ConfigError, match=r"'nothing' is no run in this MLflow store; there are: .*slow-"):
        read_runs(client, ["nothing"])


def test_only_what_differs_is_shown(world):
    found = {(d.section, d.key): d.values for d in differences(world[3])}
    assert found["configuration", "model.optimizer.lr"] == ("1e-06", "5e-06")
    assert found["configuration", "model.parallel.world_size"] == ("1", "2")
    assert ("configuration", "seed") not in found
    assert not [key for key in found if key[0] != "configuration"], "same data, code and packages"


def test_metrics_are_compared_at_equal_steps_responses_and_device_hours(world):
    runs = world[3]
    # Both reached step 4; half of it is step 2.
    by_step = {(p.metric, p.at): p.values for p in equal_points(runs, "step")}
    assert by_step["val/accuracy", 4.0] == pytest.approx((0.54, 0.66))
    assert by_step["val/accuracy", 2.0] == pytest.approx((0.52, 0.58))
    assert by_step["train/entropy", 4.0] == pytest.approx((0.25, 0.25))
    # 8 x 512 = 4 x 1024: at half of them the slow run is at step 4, the fast one at step 2.
    by_responses = {(p.metric, p.at): p.values for p in equal_points(runs, "responses")}
    assert by_responses["val/accuracy", 2048.0] == pytest.approx((0.54, 0.58))
    # A device-hour is a device-hour: 36 s on one device, 18 s on two. Both reached 4 x 36 s = 0.04 h.
    by_hours = {(p.metric, round(p.at, 9)): p.values for p in equal_points(runs, "device_hours")}
    assert by_hours["val/accuracy", 0.04] == pytest.approx((0.54, 0.66))
    assert by_hours["val/accuracy", 0.01] == pytest.approx((0.51, 0.54))
    assert course(runs[1], "val/accuracy", "device_hours")[-1] == pytest.approx((0.04, 0.66))


def test_engines_with_devices_of_their_own_cost_device_hours_too(world, tmp_path):
    client, slow, _, _ = world
    tree = {"model": {"parallel": {"world_size": 8}}, "rollout": {"devices": 8}}
    tree["mlflow"] = {"tracking_uri": tracking_uri(slow[0])}
    course = {"steps": 2, "gain": 0.1, "seconds": 1800.0, "responses": 512, "right": 50}
    _, apart = make_run(tmp_path, "apart", **course, **tree)
    [run] = read_runs(client, [apart])
    assert run.devices == 16
    assert compare([run, run]).costs[0].device_hours == pytest.approx(16)


def test_what_a_point_cost(world):
    slow, fast = compare(world[3]).costs
    assert (slow.gain, fast.gain) == (pytest.approx(8.0), pytest.approx(16.0))
    assert slow.per_point(slow.responses) == pytest.approx(512)
    assert fast.per_point(fast.responses) == pytest.approx(256)
    assert slow.per_point(slow.device_hours) == pytest.approx(0.01)
    assert fast.per_point(fast.device_hours) == pytest.approx(0.0025)


def test_validations_of_the_same_questions_are_paired(world):
    [pair] = compare(world[3]).pairs
    assert pair.prompts == 100
    assert pair.difference.value == pytest.approx(0.3)
    assert 0.2 < pair.difference.low < 0.3 < pair.difference.high < 0.4
    assert {s.tag: (s.prompts, s.baseline) for s in pair.slices} == {"half:even": (50, 0.5), "half:odd": (50, 0.5)}
    assert "last validation (step-000004)" in pair.where


def test_other_questions_are_not_paired(world, tmp_path):
    client, slow, _, _ = world
    other, _ = make_run(
        tmp_path,
        "other",
        steps=1,
        gain=0.1,
        seconds=1.0,
        responses=1,
        right=90,
        validation={"temperature": 0.5},
        mlflow={"tracking_uri": tracking_uri(slow[0])},
    )
    [pair] = compare(read_runs(client, ["slow", other.name])).pairs
    assert pair.difference is None
    assert "the same prompts, but asked or judged in another way" in pair.where


def test_validations_by_another_version_of_a_reward_are_not_paired(world, tmp_path, monkeypatch):
    client, slow, _, _ = world
    monkeypatch.chdir(tmp_path)
    tree = {"reward": {"function": "graders:grade"}, "mlflow": {"tracking_uri": tracking_uri(slow[0])}}
    course = {"steps": 1, "gain": 0.1, "seconds": 1.0, "responses": 8, "right": 50}
    ids = []
    for name, verdict in (("lenient", "True"), ("lenient too", "True"), ("strict", "response == answer")):
        (tmp_path / "graders.py").write_text(f"def grade(response, answer):\n    return {verdict}\n")
        ids.append(make_run(tmp_path, name.replace(" ", "-"), **course, **tree)[1])
    paired = [p.difference is not None for p in compare(read_runs(client, ids)).pairs]
    assert paired == [True, False]


def test_an_evaluation_belongs_to_its_run_and_is_logged_once(world):
    client, slow, fast, _ = world
    ids = []
    for (config, run_id), right in ((slow, 60), (fast, 90)):
        model = Model(f"checkpoint of {config.name}", config.name, config.model.source, f"digest-{config.name}", run_id)
        place = config.run_root
        folder = make_folder(slow[0], model, Path(place), Path(place))
        groups = [group(f"p{i}", [i < right, i < right]) for i in range(100)]
        folder.results.write_text(results.to_lines(results.of_groups(groups)))
        folder.page.write_text("page")
        folder.metrics.write_text(json.dumps(measure(groups, 1.0)))
        ids.append(log_evaluation(folder, slow[0]))
        assert log_evaluation(folder, slow[0]) == ids[-1]
    [pair] = compare(read_runs(client, ["slow", "fast"])).pairs
    assert pair.where == f"evaluate {fast[0].name} against evaluate {slow[0].name}", (
        "more answers than a validation has"
    )
    assert pair.difference.value == pytest.approx(0.3)
    run = client.get_run(ids[0])
    assert run.data.metrics["val/pass_at_2"] == pytest.approx(0.6)
    assert {a.path for a in client.list_artifacts(ids[0])} == {
        "config.yaml",
        "evaluation.html",
        "metrics.json",
        "results.jsonl",
    }
    # Evaluations can be compared with each other, too.
    [alone] = compare(read_runs(client, ids)).pairs
    assert alone.difference.value == pytest.approx(0.3)


def test_the_page_and_the_summary_say_it(world, tmp_path):
    found = compare(world[3])
    page = write_comparison(found, tmp_path / "page.html").read_text()
    for text in ("<svg", "At equal device-hours", "model.optimizer.lr", "half:even", "2 runs compared", "+30.0"):
        assert text in page, text
    assert "<script" not in page
    summary = markdown(found)
    assert "more than chance" in summary
    assert "| configuration: model.optimizer.lr | 1e-06 | 5e-06 |" in summary
    assert len({line.count("|") for line in summary.splitlines() if line.startswith("|")}) == 1, "tables are whole"
