"""Topic 07: at least as right as the reference, row by row; calm where the text is hostile.

The reference compares normalised strings and asks a computer algebra system last. Ours must say "right" wherever the
reference says so and the mathematics agrees; where it says more, `MORE_THAN_THE_REFERENCE` lists the open rows
(docs/rewards.md gives the reasons).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dapo.algo.batch import with_rewards
from dapo.config.run import RunConfig
from dapo.errors import ConfigError
from dapo.rewards.geometry3k import grade, last_boxed
from dapo.rewards.load import load
from dapo.rewards.mathematics import answer_line, boxed
from dapo.rewards.pool import RewardPool
from dapo.types import Completion, FinishReason, Prompt, Rollout, RolloutGroup, Scored
from tests.parity.cases import Case, load_cases
from tests.parity.conftest import OPEN_VECTORS
from tests.rewards.units_differ import units_differ

SCORERS = (("geo3k", grade), ("math_dapo", answer_line), ("math_dapo_strict", boxed), ("math_reward", boxed))
"""The reference's scorers and the graders that replace them."""

MORE_THAN_THE_REFERENCE = {
    "rw-o-int-expr", "rw-o-int-latex-times", "rw-o-frac-unreduced", "rw-o-frac-unreduced-slash", "rw-o-frac-int-gt",
    "rw-o-frac-nested", "rw-o-sqrt-unicode", "rw-o-sqrt-perfect", "rw-o-sqrt-pow", "rw-o-pi-unicode",
    "rw-o-deg-unicode", "rw-o-unit-m", "rw-o-unit-units", "rw-o-pct-frac", "rw-o-neg-unicode", "rw-o-neg-double",
    "rw-o-algebra-var-3", "rw-o-box-then-empty-unclosed", "rw-o-zh-unit", "rw-o-zh-deg",
}  # fmt: skip

PROSE_BEHIND = re.compile(r"answer\s*:[^\n\\]*\bbecause\b[^\n]*$", re.IGNORECASE)
"""``Answer: 48 because it fits``: the line is the answer, and a line that argues is not 48."""

REWARD_OF_SOURCE = {
    "hiyouga/geometry3k": "dapo.rewards.geometry3k:grade",
    "math": "dapo.rewards.mathematics:answer_line",
    "math_dapo": "dapo.rewards.mathematics:answer_line",
    "math_dapo_reasoning": "dapo.rewards.mathematics:answer_line",
    "DigitalLearningGmbH/MATH-lighteval": "dapo.rewards.mathematics:boxed",
    "HuggingFaceH4/MATH-500": "dapo.rewards.mathematics:boxed",
    "lighteval/MATH": "dapo.rewards.mathematics:boxed",
    "openai/gsm8k": "dapo.rewards.mathematics:hashes",
}
"""What docs/rewards.md recommends as `reward.function` for a data source; the AIME sets go by their prefix."""


NO_ANSWER = (
    "[0-9]+(_[0-9]+)+",
    r".*[0-9.]\s*\\text\s*\{[^{}]*\b(?:not|is|wrong)\b[^{}]*\}",
    r"\s*(?:[0-9.]+\s*[a-z]|[a-z]\s*[-+]\s*[0-9.]+)\s*=.*",
)
"""A number as Python writes it, a number that prose takes back, an equation that is not solved."""


def strings(case: Case) -> tuple[str, str]:
    response = case.inputs["response"]
    if not isinstance(response, str):
        response = "".join(piece * count for piece, count in response["parts"])
    return response, case.inputs["ground_truth"]


def reference(case: Case, scorer: str) -> dict[str, Any]:
    """The verdict of one of the reference's scorers, corrected where the case says what is right."""
    return case.out.get(scorer, {}) | (case.ideal or {}).get(scorer, {})


def excused(case: Case, response: str, truth: str) -> bool:
    """Where the reference may say "right" and is not (docs/rewards.md, "Where the reference is wrong")."""
    box = last_boxed(response) or ""
    return (
        any(re.fullmatch(pattern, box) for pattern in NO_ANSWER)
        or units_differ(box, truth)
        or any(one in box and two in truth for one, two in (("circ", "%"), ("%", "circ")))
    )


@pytest.mark.golden("07_reward_rows")
def test_no_row_is_wrong_that_the_reference_has_right(case: Case) -> None:
    response, truth = strings(case)
    for scorer, grader in (
        ("geo3k", grade),
        ("math_dapo", answer_line),
        ("math_dapo_strict", boxed),
        ("math_reward", boxed),
    ):
        verdict = reference(case, scorer)
        right = bool(verdict.get("acc", verdict.get("score", 0.0) > 0))
        assert grader(response, truth).accuracy or not right or excused(case, response, truth), scorer


@pytest.mark.golden("07_reward_rows")
def test_format_answer_and_score_are_the_references_where_the_verdicts_agree(case: Case) -> None:
    response, truth = strings(case)
    verdict, ours = reference(case, "geo3k"), grade(response, truth)
    assert ours.format == verdict["format"]
    if verdict["pred"] != "None":
        assert ours.extracted == verdict["pred"][: len(ours.extracted) or None]
    if ours.accuracy == bool(verdict["acc"]):
        assert reward_of(ours) == pytest.approx(verdict["score"], abs=1e-12)


def reward_of(outcome: Scored) -> float | None:
    """What a run with the recipe's weights makes of an outcome."""
    rollout = Rollout("p", 0, Completion((1,), (0.0,), FinishReason.STOP, 0), outcome, "")
    return with_rewards(RolloutGroup(Prompt("p", (1,), (), (), "48", ""), (rollout,)), RunConfig()).rewards[0]


@pytest.mark.golden("07_reward_rows")
def test_more_is_right_only_where_it_is_listed(case: Case) -> None:
    response, truth = strings(case)
    if grade(response, truth).accuracy and not reference(case, "geo3k")["acc"]:
        if case.id not in {open_case.id for open_case in load_cases(OPEN_VECTORS, "07_reward_rows")}:
            pytest.skip(
                f"right here and wrong in the reference, for people to look at: {response[-60:]!r} is {truth!r}"
            )
        assert case.id in MORE_THAN_THE_REFERENCE


def test_at_least_as_many_rows_are_right_as_in_the_reference(golden: Path) -> None:
    rows = load_cases(golden, "07_reward_rows")
    ours = sum(grade(*strings(case)).accuracy for case in rows)
    assert ours >= sum(bool(reference(case, "geo3k")["acc"]) for case in rows)


@pytest.mark.golden("07_reward_math_verify")
def test_no_answer_is_wrong_that_the_algebra_system_has_right(case: Case) -> None:
    response, truth = strings(case)
    if case.out.get("score"):
        if not re.search(r"\\boxed|answer\s*:", response, re.IGNORECASE) or re.search(PROSE_BEHIND, response):
            pytest.skip("it searches the prose for numbers; ours reads the place that was asked for, and all of it")
        ours = answer_line(response, truth).accuracy or boxed(response, truth).accuracy
        assert ours or excused(case, response, truth)


@pytest.mark.golden("07_reward_dispatch")
def test_each_data_source_has_a_reward_that_agrees(case: Case) -> None:
    source, (response, truth) = case.inputs["data_source"], strings(case)
    name = REWARD_OF_SOURCE.get("math_dapo" if source.startswith("aime") else source)
    if "error" in case.out:
        assert name is None
        with pytest.raises(ConfigError):
            load(source)
        return
    if name is None:
        pytest.skip(f"docs/rewards.md recommends nothing for {source}")
    outcome = load(name)(response, truth)
    assert isinstance(outcome, Scored)
    if "acc" in case.out:
        assert outcome.accuracy is case.out["acc"]
    elif source == "hiyouga/geometry3k":
        assert reward_of(outcome) == pytest.approx(case.out["scalar"], abs=1e-12)
    else:
        assert float(outcome.accuracy) == case.out["scalar"]


@pytest.fixture(scope="module")
def throw_away() -> Iterator[RewardPool]:
    with RewardPool("tests.rewards.audited:watched", deadline_s=5.0) as pool:
        yield pool


@pytest.mark.golden("07_reward_hostile")
def test_hostile_text_is_judged_in_time_and_touches_nothing(case: Case, throw_away: RewardPool) -> None:
    response, truth = strings(case)
    started = time.perf_counter()
    (outcome,) = throw_away.score([(response, truth)])
    wall = time.perf_counter() - started
    assert isinstance(outcome, Scored), outcome
    # The machine may be busy; the grader's own processor time is what it answers for.
    assert min(wall, float(outcome.extracted)) < case.extra["requirement"]["max_seconds"]
    verdict = case.out.get("geo3k", {})
    if verdict.get("status") == "returned" and verdict["value"]["acc"]:
        assert outcome.accuracy or excused(case, response, truth)


def test_the_watch_sees_what_is_evaluated() -> None:
    with RewardPool("tests.rewards.audited:tempted", deadline_s=5.0) as pool:
        (outcome,) = pool.score([("1", "1")])
    assert "the graders attempted ['compile'" in str(outcome)
