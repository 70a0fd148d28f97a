"""`dapo reward test` passes what is sound and names what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo.errors import ConfigError
from dapo.rewards.selftest import Finding, report, run

CHECKS = ["loads", "golden answers", "empty", "huge", "unicode", "repetition", "order", "time"]


def failed(findings: list[Finding]) -> list[str]:
    return [finding.check for finding in findings if not finding.ok]


@pytest.mark.parametrize(
    "name", ["geometry3k:grade", "mathematics:answer_line", "mathematics:boxed", "mathematics:hashes"]
)
def test_the_rewards_we_ship_pass(name: str) -> None:
    findings = run(f"dapo.rewards.{name}")
    assert [finding.check for finding in findings] == CHECKS
    assert failed(findings) == []


def test_a_reward_that_is_always_right_is_caught() -> None:
    findings = run("tests.rewards.samples:lenient")
    assert failed(findings) == ["golden answers", "empty"]
    assert "is wrong, the reward says" in findings[1].detail


def test_a_reward_that_remembers_is_caught() -> None:
    assert {"repetition", "order"} <= set(failed(run("tests.rewards.samples:Counting")))


def test_a_reward_that_raises_is_caught() -> None:
    findings = run("tests.rewards.samples:obedient")
    assert {"golden answers", "empty", "huge", "unicode"} <= set(failed(findings))
    assert "AssertionError" in findings[1].detail


@pytest.mark.parametrize("name", ["sluggish", "slow_once"])
def test_a_slow_reward_is_caught_also_where_it_remembers(name: str) -> None:
    findings = run(f"tests.rewards.samples:{name}", deadline_s=0.2)
    assert "time" in failed(findings)


def test_a_reward_that_cannot_be_loaded_is_one_finding() -> None:
    (finding,) = run("dapo.rewards.nowhere:grade")
    assert not finding.ok
    assert "No module named" in finding.detail


def test_the_command_prints_a_line_per_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    golden = tmp_path / "golden.json"
    golden.write_text(json.dumps([{"response": "\\boxed{2x}", "answer": "x+x", "accuracy": True}]))
    assert report("dapo.rewards.geometry3k:grade", golden=golden)
    lines = capsys.readouterr().out.splitlines()
    assert [line[6:].partition(":")[0] for line in lines] == CHECKS
    assert "1 known verdicts agree" in lines[1]


def test_the_command_fails_where_a_golden_answer_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    golden = tmp_path / "golden.json"
    golden.write_text(json.dumps([{"response": "\\boxed{2x}", "answer": "x+x", "accuracy": False}]))
    assert not report(golden=golden)
    assert "FAIL  golden answers" in capsys.readouterr().out


def test_a_golden_file_of_another_form_is_refused(tmp_path: Path) -> None:
    golden = tmp_path / "golden.json"
    golden.write_text('[{"response": "48"}]')
    with pytest.raises(ConfigError, match=r"golden\.json"):
        report(golden=golden)
