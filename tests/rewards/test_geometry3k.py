"""Where the answer is looked for, and what form is asked for."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo.rewards.geometry3k import grade, has_format, last_boxed
from dapo.types import Scored

RECIPE_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
"""The recipe's format in its own words."""

PIECES = st.lists(st.sampled_from(["<think>", "</think>", "\\boxed{", "}", "{", "48", "\n", "\\", "x"]), max_size=12)


@pytest.mark.parametrize(
    ("response", "box"),
    [
        (r"\boxed{48}", "48"),
        (r"first \boxed{3}, then \boxed{48}.", "48"),
        (r"\boxed{48} and \boxed{", "48"),
        (r"\boxed{48} and \boxed{4{9", "48"),
        (r"\boxed{\boxed{48}}", "48"),
        (r"\boxed{x = \boxed{48} cm}", "48"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{48}}", "48"),
        (r"\boxed{}", ""),
        (r"{\boxed{48}", "48"),
        (r"\boxed{1 \boxed{2} \boxed{3", "2"),
        (r"\boxed{48", None),
        (r"\fbox{48}", None),
        (r"\boxed 48", None),
        ("48", None),
        ("", None),
    ],
)
def test_the_last_complete_box_wins(response: str, box: str | None) -> None:
    assert last_boxed(response) == box


@given(PIECES.map("".join))
def test_format_is_the_recipes_expression(response: str) -> None:
    assert has_format(response) is (RECIPE_FORMAT.fullmatch(response) is not None)


def test_a_right_answer_in_the_asked_form_has_both_parts() -> None:
    assert grade("<think>24 + 24</think> \\boxed{48}", "48") == Scored(True, 1.0, 0.0, "48")


def test_form_and_accuracy_are_judged_apart() -> None:
    assert grade("\\boxed{48}", "48") == Scored(True, 0.0, 0.0, "48")
    assert grade("<think></think>\\boxed{47}", "48") == Scored(False, 1.0, 0.0, "47")


def test_no_box_is_no_answer_even_where_the_truth_is_called_none() -> None:
    assert grade("no box", "None") == Scored(False, 0.0, 0.0, "")


@pytest.mark.parametrize(
    "response",
    [
        "<think>" + "a" * 2_000_000 + "</think>\\boxed{48}",
        "<think></think>" + "\\boxed{" * 300_000,
        "<think>" + "</think>" * 250_000 + "\\boxed{" * 250_000,
        "\\boxed" + "{" * 1_000_000 + "}" * 1_000_000,
        "\\boxed{" + "\\" * 2_000_000 + "}",
        "\\boxed{48}" * 200_000 + "\\boxed{",
    ],
    ids=lambda response: ascii(response[:12] + response[-12:]),
)
def test_two_megabytes_are_read_once(response: str) -> None:
    started = time.process_time()
    grade(response, "48")
    assert time.process_time() - started < 2.0
