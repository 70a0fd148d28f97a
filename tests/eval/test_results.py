"""Verdicts by prompt: kept exactly, and estimated with intervals."""

import math
import re

import pytest

from dapo.errors import DataError
from dapo.eval.results import accuracies, estimates, from_lines, numbers, of_groups, slices, to_lines, val_metrics
from tests import records
from tests.eval.verdicts import prompt
from tests.records import group


def test_results_of_groups_survive_the_trip_through_a_file():
    groups = [group("a", [True, False], lengths=[3, 5], cut=[1]), group("b", [None, True]), group("c", [None])]
    results = of_groups(groups)
    assert from_lines(to_lines(results), "here") == results
    assert accuracies(results) == {"a": 0.5, "b": 1.0}, "prompts without a verdict are left out"
    assert numbers(results) == {
        "accuracy": 0.75,
        "format": 0.5,
        "length_mean": 2.8,
        "length_max": 5.0,
        "truncated": 0.2,
        "failed": 0.4,
        "prompts": 3,
        "responses": 5,
    }


def test_a_damaged_line_is_named():
    with pytest.raises(DataError, match="there, line 2 is not a prompt's result"):
        from_lines('{"id": "a", "tags": [], "samples": []}\n{"id": 1}\n', "there")


def test_pass_and_majority_by_hand():
    # Two right of four, the wrong ones agree with nobody: pass@2 = 1 - C(2,2)/C(4,2) = 5/6.
    one = prompt("a", [True, True, False, False], extracted=["5", "5", "6", "7"])
    other = prompt("b", [False, False, True, False], extracted=["1", "1", "2", "1"])
    found = estimates({"a": one, "b": other})
    assert found["mean@4"].value == pytest.approx((0.5 + 0.25) / 2)
    assert found["pass@2"].value == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert found["pass@4"].value == 1.0
    assert found["maj@4"].value == pytest.approx(0.5)
    assert found["mean@4"].low < 0.375 < found["mean@4"].high


def test_failed_checks_are_left_out_of_estimates():
    found = estimates({"a": prompt("a", [True, None]), "b": prompt("b", [None, None])})
    assert found["mean@2"].value == 1.0
    assert "pass@2" not in found, "no prompt has two verdicts"


def test_a_prompt_is_in_each_of_its_slices():
    found = slices({"a": prompt("a", [True], tags=["x", "y"]), "b": prompt("b", [True], tags=["y"])})
    assert {tag: set(members) for tag, members in found.items()} == {"x": {"a"}, "y": {"a", "b"}}


def test_accuracy_is_the_mean_over_prompts_with_its_interval():
    metrics = val_metrics(of_groups([group(str(i), [i < 8]) for i in range(10)]))
    assert metrics["val/accuracy"] == 0.8
    assert (metrics["val/accuracy_low"], metrics["val/accuracy_high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert metrics["val/prompts"] == metrics["val/responses"] == 10
    assert not any("_at_" in name for name in metrics)


def test_a_failed_check_is_counted_and_is_not_a_wrong_answer():
    metrics = val_metrics(
        of_groups([group("a", [True]), group("b", [None]), group("c", [False]), group("d", [None, True])])
    )
    assert metrics["val/accuracy"] == pytest.approx(2 / 3)
    assert metrics["val/failed"] == 2 / 5
    assert metrics["val/format"] == 0.5


def test_nothing_judged_is_not_an_accuracy_of_zero():
    assert math.isnan(val_metrics(of_groups([group("a", [None])]))["val/accuracy"])


def test_lengths_and_truncation_count_every_response():
    metrics = val_metrics(of_groups([group("a", [True, False], lengths=[2, 10], cut=[1])]))
    assert metrics["val/length_mean"] == 6
    assert metrics["val/length_max"] == 10
    assert metrics["val/truncated"] == 0.5


def test_several_samples_give_mean_pass_and_majority():
    metrics = val_metrics(of_groups([group("a", [True, True, True, False]), group("b", [False, False, False, False])]))
    assert metrics["val/mean_at_4"] == pytest.approx(3 / 8)
    assert metrics["val/pass_at_2"] == 0.5  # of "a", every pair has a right answer; of "b", none
    assert metrics["val/pass_at_4"] == 0.5
    assert metrics["val/maj_at_4"] == 0.5


def test_slices_are_measured_by_tag():
    groups = [
        group("a", [True], asked=records.prompt("a", tags=("shape:circle", "hard"))),
        group("b", [False], asked=records.prompt("b", tags=("shape:circle",))),
        group("c", [True], asked=records.prompt("c", tags=("a,b",))),
    ]
    metrics = val_metrics(of_groups(groups))
    assert metrics["val/slice/shape:circle/accuracy"] == 0.5
    assert metrics["val/slice/shape:circle/prompts"] == 2
    assert metrics["val/slice/hard/accuracy"] == 1.0
    assert metrics["val/slice/a_b/accuracy"] == 1.0
    # What MLflow takes as the name of a metric.
    assert all(re.fullmatch(r"[/\w.\- :]+", name) for name in metrics)
