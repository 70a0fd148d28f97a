"""Topic 06: soft overlong punishment against the reference, and where it is unbounded, against the paper."""

from __future__ import annotations

from typing import Any

import pytest

from dapo.algo.overlong import soft_overlong_penalty
from dapo.errors import ConfigError
from tests.parity.cases import TOLERANCES, Case, assert_matches


@pytest.mark.golden("06_overlong")
def test_soft_overlong_punishment_agrees(case: Case) -> None:
    given, manager = case.inputs, case.out["batch_manager"]
    if "error" in manager or (given["enable"] and given["buffer_len"] == 0):
        with pytest.raises(ConfigError, match="buffer"):
            penalties(given)
        return
    actual = penalties(given)
    if "paper_formula" in case.extra:
        assert_matches(actual, case.extra["paper_formula"], TOLERANCES["float64"])
    if case.quirk is None or case.ideal is not None:
        expected = manager if case.ideal is None else case.ideal["batch_manager"]
        rewards = [score + penalty for score, penalty in zip(given["base_scores"], actual, strict=True)]
        ours = {
            "seq_reward": rewards,
            "overlong_reward": actual if given["enable"] else [],
            "overlong_flag": [penalty < 0 for penalty in actual] if given["enable"] else [],
            "reward_position": positions(given["response_lengths"], rewards),
        }
        assert_matches(ours, expected, TOLERANCES["float32"])


def penalties(given: dict[str, Any]) -> list[float]:
    if not given["enable"]:
        return [0.0] * len(given["response_lengths"])
    return [
        soft_overlong_penalty(
            length,
            max_length=given["max_response_length"],
            buffer=given["buffer_len"],
            factor=given["penalty_factor"],
        )
        for length in given["response_lengths"]
    ]


def positions(lengths: list[int], rewards: list[float]) -> list[list[int]]:
    """The reference writes a reward at the last token; ours belongs to the response, so this is derived."""
    return [[length - 1] if reward else [] for length, reward in zip(lengths, rewards, strict=True)]
