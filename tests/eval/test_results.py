"""Verdicts by prompt: kept exactly, and estimated with intervals."""

import pytest

from dapo.errors import DataError
from dapo.eval.results import accuracies, estimates, from_lines, numbers, of_groups, slices, to_lines
from tests.eval.verdicts import prompt
from tests.records import group


def test_results_of_groups_survive_the_trip_through_a_file():
    groups = [group("a", [True, False], lengths=[3, 5], cut=[1]), group("b", [None, True])]
    results = of_groups(groups)
    assert from_lines(to_lines(results), "here") == results
    assert accuracies(results) == {"a": 0.5, "b": 1.0}
    assert numbers(results) == {
        "accuracy": 0.75,
        "format": 0.5,
        "length_mean": 3.0,
        "length_max": 5.0,
        "truncated": 0.25,
        "failed": 0.25,
        "prompts": 2,
        "responses": 4,
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
