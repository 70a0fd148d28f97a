"""No input makes the graders raise, hang or grow."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dapo.rewards import equal, exact
from dapo.rewards.equal import equivalent
from dapo.rewards.geometry3k import grade
from dapo.rewards.mathematics import answer_line, boxed, hashes
from dapo.types import Scored
from tests.rewards import inputs

MAX_CPU_S = 0.1
MAX_GROWTH_KIB = 100 * 1024
GRADERS = (grade, answer_line, boxed, hashes)
SEEDS = st.integers(0, 2**64)
TRUTHS = ["48", "\\frac{1}{2}", "2\\sqrt{3}", "0.5", "65^\\circ", "x", "(3, 4)", "2, 3", "12 cm", "25\\pi", "B", ""]


def judge(response: str, truth: str) -> None:
    seconds = timed(response, truth)
    if seconds >= MAX_CPU_S:
        # The process collects its garbage at times; what is slow is slow again.
        seconds = timed(response, truth)
    assert seconds < MAX_CPU_S, f"{seconds:.3f} s for {response[:200]!r} against {truth[:200]!r}"


def timed(response: str, truth: str) -> float:
    """Processor seconds of one judgement that remembers nothing."""
    for cache in (equal._compare, equal._understood, exact.prime_factors):
        cache.cache_clear()
    started = time.process_time()
    assert isinstance(grade(response, truth), Scored)
    return time.process_time() - started


@settings(max_examples=2000, deadline=None)
@given(SEEDS)
def test_generated_responses_are_judged(seed: int) -> None:
    random = Random(seed)
    truth = random.choice([random.choice(TRUTHS), inputs.answer(random)])
    judge(inputs.response(random), truth)


@settings(max_examples=500, deadline=None)
@given(st.text(), st.sampled_from(TRUTHS))
@example("\\boxed{" * 40, "48")
@example("\\boxed{\\pm}", "48")
@example("\\boxed{=}", "=")
@example("\\boxed{\\frac}", "48")
@example("\\boxed{\\sqrt[}", "48")
@example("\\boxed{x_}", "x")
def test_any_text_is_judged_by_every_grader(text: str, truth: str) -> None:
    for grader in GRADERS:
        assert isinstance(grader(text, truth), Scored)
        assert isinstance(grader(f"\\boxed{{{text}}}\nAnswer: {text}\n#### {text}", truth), Scored)
        assert isinstance(grader("<think></think>\\boxed{48}", text), Scored)


@settings(max_examples=1000, deadline=None)
@given(SEEDS)
def test_equality_is_reflexive_and_symmetric(seed: int) -> None:
    random = Random(seed)
    one, two = inputs.answer(random), inputs.answer(random)
    assert equivalent(one, one) is (one.strip() != "")
    # An equation in several unknowns names a value (DE + EF = 10), but no value is an equation.
    if not set("=≈∈是于").intersection(one + two) and not re.search(r"\\(?:in|approx)(?![a-z])", one + two):
        assert equivalent(one, two) is equivalent(two, one)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_thousand_responses_are_judged_quickly() -> None:
    judged = 0

    @settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(SEEDS)
    def judge_a_hundred(seed: int) -> None:
        nonlocal judged
        random = Random(seed)
        for _ in range(100):
            judge(inputs.response(random), random.choice([random.choice(TRUTHS), inputs.answer(random)]))
        judged += 100

    judge_a_hundred()
    assert judged >= 200_000


def grown(seconds: float, grader: str) -> int:
    command = [sys.executable, "-m", "tests.rewards.growth", str(seconds), grader]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_judging_takes_little_memory() -> None:
    assert grown(1.0, "dapo.rewards.geometry3k:grade") < MAX_GROWTH_KIB


def test_a_grader_that_takes_much_memory_for_a_moment_is_seen() -> None:
    assert grown(0.3, "tests.rewards.samples:greedy") > MAX_GROWTH_KIB


@pytest.mark.nightly
@pytest.mark.slow
def test_judging_for_longer_takes_little_memory() -> None:
    assert grown(30.0, "dapo.rewards.geometry3k:grade") < MAX_GROWTH_KIB
