"""Group advantages by hand."""

import math

import pytest

from dapo.algo.advantage import group_advantages


def test_one_right_of_four_stands_out_by_its_standard_deviation() -> None:
    # mean 1/4; variance (9/16 + 3/16) / 3 = 1/4, so std 1/2.
    assert group_advantages([1.0, 0.0, 0.0, 0.0], "grpo", epsilon=0.0) == [1.5, -0.5, -0.5, -0.5]
    assert group_advantages([1.0, 0.0, 0.0, 0.0], "dr_grpo") == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages([1.0, 0.0, 0.0, 0.0], "rloo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


def test_epsilon_is_added_to_the_standard_deviation() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 0.0], "grpo", epsilon=0.5) == [0.75, -0.25, -0.25, -0.25]


def test_equal_rewards_that_float64_cannot_average_give_zero() -> None:
    assert sum([0.1] * 6) / 6 != 0.1
    assert group_advantages([0.1] * 6, "grpo") == [0.0] * 6


def test_a_group_without_verdicts_is_empty() -> None:
    assert group_advantages([], "grpo") == []


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_reward_that_is_not_finite_is_refused(spoilt: float, place: int) -> None:
    rewards = [1.0, 0.0]
    rewards[place] = spoilt
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(rewards, "grpo")
