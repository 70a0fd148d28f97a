"""Estimates against counting by hand and against textbook intervals."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo.eval.estimate import (
    accuracy_interval,
    bootstrap_mean,
    majority,
    over_prompts,
    paired_difference,
    pass_at_k,
)


@pytest.mark.parametrize(("samples", "correct", "k"), [(6, 0, 3), (6, 2, 3), (6, 4, 3), (6, 6, 1), (5, 1, 5)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples: int, correct: int, k: int) -> None:
    drawn = [i < correct for i in range(samples)]
    subsets = list(itertools.combinations(drawn, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_more_than_was_drawn_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} must lie between 1 and the 4 samples"):
        pass_at_k(4, 1, k)


def test_a_tied_vote_goes_to_the_answer_seen_first() -> None:
    assert majority(["a", "b", "b", "a"], [2, 0, 1, 3]) == 2
    assert majority(["a", "b", "b", "a"], [3, 2]) == 3


def test_best_of_two_of_a_coin_is_three_quarters() -> None:
    coin = [0.0, 1.0]
    assert bootstrap_mean(2, 2, lambda row: max(coin[i] for i in row), resamples=20_000) == pytest.approx(
        0.75, abs=0.01
    )


def test_a_name_is_averaged_over_the_prompts_that_have_it() -> None:
    assert over_prompts([{"mean@2": 0.0, "std@2": 1.0}, {"mean@2": 1.0}]) == {"mean@2": 0.5, "std@2": 1.0}


# Wilson 1927, 95 %; values from the closed form at z = 1.96.
@pytest.mark.parametrize(
    ("right", "prompts", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_one_sample_per_prompt_gives_the_wilson_interval(right: int, prompts: int, low: float, high: float) -> None:
    interval = accuracy_interval([1.0] * right + [0.0] * (prompts - right))
    assert interval.value == right / prompts
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)


def test_samples_that_agree_within_prompts_narrow_nothing() -> None:
    once = accuracy_interval([1.0, 0.0] * 20)
    # Four samples a prompt, all equal: still 40 independent trials.
    assert accuracy_interval([sum([x] * 4) / 4 for x in [1.0, 0.0] * 20]) == once
    varied = accuracy_interval([0.5] * 39 + [0.75])
    assert varied.high - varied.low < (once.high - once.low) / 2


def test_no_prompts_have_no_accuracy() -> None:
    assert math.isnan(accuracy_interval([]).value)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_an_interval_holds_its_value_and_stays_between_0_and_1(accuracies: list[float]) -> None:
    interval = accuracy_interval(accuracies)
    assert 0 <= interval.low <= interval.value + 1e-12
    assert interval.value - 1e-12 <= interval.high <= 1


def test_a_paired_difference_sees_through_hard_and_easy_prompts() -> None:
    rng = random.Random(0)
    theirs = {f"p{i}": rng.choice([0.0, 1.0]) for i in range(400)}
    better = {prompt: min(1.0, value + (i % 10 == 0)) for i, (prompt, value) in enumerate(theirs.items())}
    paired = paired_difference(better, theirs)
    differences = [better[p] - theirs[p] for p in theirs]
    mean = sum(differences) / 400
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 400 / 400)
    assert paired.value == pytest.approx(mean)
    assert paired.low == pytest.approx(mean - 1.96 * error, abs=error / 4)
    assert paired.high == pytest.approx(mean + 1.96 * error, abs=error / 4)
    assert paired.low > 0
    # Unpaired, the same two accuracies could not be distinguished.
    assert accuracy_interval(list(better.values())).low < accuracy_interval(list(theirs.values())).high


def test_a_model_does_not_differ_from_itself() -> None:
    accuracies = {"a": 0.25, "b": 1.0}
    paired = paired_difference(accuracies, accuracies)
    assert (paired.value, paired.low, paired.high) == (0.0, 0.0, 0.0)


def test_different_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="2 and 1 given, 1 in common"):
        paired_difference({"a": 1.0, "b": 0.0}, {"a": 1.0})
    with pytest.raises(ValueError, match="0 and 0 given"):
        paired_difference({}, {})
