"""Topic 02: group advantages against the reference."""

from __future__ import annotations

import pytest
import torch

from dapo.algo.advantage import group_advantages
from tests.parity.cases import GROUP_OF_ONE_TOLERANCE, Case, assert_matches


@pytest.mark.golden("02_grpo_advantage")
def test_group_advantages_agree(case: Case) -> None:
    groups = case.inputs["group"]
    scores = case.tensor("token_level_rewards").double().sum(1).tolist()
    mask = case.tensor("response_mask").double()
    actual = {}
    for name, kind in (("norm_by_std", "grpo"), ("mean_only", "dr_grpo")):
        per_row = torch.zeros(len(groups), dtype=torch.float64)
        for label in dict.fromkeys(groups):
            members = [row for row, other in enumerate(groups) if other == label]
            rewards = [scores[row] for row in members]
            values = group_advantages(rewards, kind, epsilon=case.inputs["epsilon"])
            per_row[members] = torch.tensor(values, dtype=torch.float64)
        actual[name] = {"advantages": per_row[:, None] * mask}
    assert all(torch.isfinite(result["advantages"]).all() for result in actual.values())
    if case.expected is not None:
        has_group_of_one = any(groups.count(label) == 1 for label in groups)
        tolerance = max(case.tolerance(), GROUP_OF_ONE_TOLERANCE) if has_group_of_one else case.tolerance()
        assert_matches(actual, case.expected, tolerance)
