"""The text rewards look for the answer in other places."""

from __future__ import annotations

import pytest

from dapo.rewards.mathematics import answer_line, boxed, hashes


@pytest.mark.parametrize(
    "response",
    [
        "Steps.\nAnswer: 48", "answer : $48$", "**Answer:** 48.", "Answer: 3\nAnswer: 48", "Answer:\n48",
        "Answer: x = 48", "Answer: \\boxed{48}", "Answer: $\\boxed{48}$.", "Answer: 48^\\circ",
        "Answer: 48 square units", "Answer: the 48", "so \\boxed{48}",
    ],
)  # fmt: skip
def test_an_answer_line_is_read_and_a_box_without_one(response: str) -> None:
    assert answer_line(response, "48").accuracy


@pytest.mark.parametrize("response", ["", "48", "Answer:", "Answer: 48 because it fits", "\\boxed{48}\nAnswer: 47"])
def test_the_answer_line_decides_where_there_is_one(response: str) -> None:
    assert not answer_line(response, "48").accuracy


def test_a_missing_answer_matches_no_ground_truth() -> None:
    assert not answer_line("no answer", "[INVALID]").accuracy


def test_a_box_alone_is_enough_for_math() -> None:
    assert boxed("so $\\boxed{\\frac{1}{2}}$", "0.5").accuracy
    assert boxed("so $\\boxed 48$", "48").accuracy
    assert not boxed("Answer: 48", "48").accuracy


def test_what_follows_the_hashes_is_the_answer() -> None:
    assert hashes("24 + 24\n#### 48", "24 + 24 = 48\n#### 48").accuracy
    assert hashes("#### 1,200", "1200").accuracy
    assert not hashes("48", "48").accuracy
    assert not hashes("#### 47\n", "#### 48").accuracy
