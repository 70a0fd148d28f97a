"""The runner itself: nothing in a golden folder is passed over in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parity.cases import assert_matches, load_cases, overlay, topic_of


def test_every_file_belongs_to_a_topic(golden: Path) -> None:
    files = sorted(golden.glob("*.json"))
    assert files, f"no golden files in {golden}"
    assert [f.name for f in files if topic_of(f, json.loads(f.read_text(encoding="utf-8"))) is None] == []


def test_a_renamed_file_is_found_by_its_topic(tmp_path: Path) -> None:
    case = {"id": "a", "dtype": "float64", "in": {}, "out": {"x": 1.0}}
    (tmp_path / "other.json").write_text(json.dumps({"topic": "02_grpo_advantage", "cases": [case]}))
    assert [c.id for c in load_cases(tmp_path, "02_grpo_advantage")] == ["a"]
    assert load_cases(tmp_path, "01_policy_loss") == []


def test_overlay_replaces_adds_and_removes() -> None:
    base = {"a": 1, "b": {"c": 2, "d": 3}}
    assert overlay(base, {"b": {"c": None, "e": 5}, "a": 7}) == {"a": 7, "b": {"d": 3, "e": 5}}


@pytest.mark.parametrize("wrong", [{"x": [1.0]}, {"x": [1.0, 2.1]}, {"x": [1.0, float("nan")]}, {}])
def test_a_difference_is_found(wrong: dict[str, list[float]]) -> None:
    with pytest.raises(AssertionError):
        assert_matches(wrong, {"x": [1.0, 2.0]}, (1e-7, 1e-10))


def test_non_finite_numbers_compare_by_meaning() -> None:
    assert_matches([float("nan"), float("inf"), 1], ["NaN", "Infinity", 1.0])
