"""Topic 03: KL estimators, and KL in reward with its controllers, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dapo.algo.batch import subtract_kl
from dapo.algo.kl import KlController, kl_estimate, kl_per_token
from dapo.config.algorithm import KlConfig, KlKind
from dapo.types import RolloutGroup
from tests.parity.cases import Case, assert_matches
from tests.records import prompt

PLAIN: dict[str, KlKind] = {"k1": "k1", "k2": "k2", "k3": "k3", "abs": "abs"}
PLAIN |= {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
OUR_NAME: dict[str, KlKind] = PLAIN | {f"{name}+": f"{kind}+" for name, kind in PLAIN.items()}


@pytest.mark.golden("03_kl_penalty")
def test_estimators_and_their_gradients_agree(case: Case) -> None:
    if case.expected is None:
        return
    for name, expected in case.expected["by_kind"].items():
        if "error" in expected:
            # The snapshot does not know the straight-through kinds; 0.9.1 does, and so do we.
            if name not in OUR_NAME:
                with pytest.raises(ValueError, match="unknown"):
                    kl_estimate(case.tensor("logprob"), case.tensor("ref_logprob"), name)
            continue
        logprobs = case.tensor("logprob").requires_grad_()
        value = kl_estimate(logprobs, case.tensor("ref_logprob"), OUR_NAME[name])
        value.sum().backward()
        assert_matches({"value": value, "grad_logprob": logprobs.grad}, expected, case.tolerance(), name)


@pytest.mark.golden("03_kl_in_reward")
def test_kl_in_reward_and_its_controller_agree(case: Case) -> None:
    given = case.inputs
    adaptive = {"target": given["target_kl"], "horizon": given["horizon"]} if given["controller"] == "adaptive" else {}
    controller = KlController(KlConfig(reward_coef=given["kl_coef"], kind=OUR_NAME[given["kl_penalty"]], **adaptive))
    mask = case.tensor("response_mask").bool()
    rewards = case.tensor("token_level_scores")
    old, ref = (
        [row[valid].tolist() for row, valid in zip(case.tensor(name), mask, strict=True)]
        for name in ("old_log_probs", "ref_log_prob")
    )
    # Ours is one group whose rewards are the rows' sums; the reference spreads the same over the tokens.
    group = RolloutGroup(prompt("case"), (), rewards=tuple(rewards.double().sum(1).tolist()))
    [penalised], measured = subtract_kl([group], [old], [ref], controller.coef, controller.config.kind)
    for row, valid in enumerate(mask):
        kl = kl_per_token(old[row], ref[row], controller.config.kind)
        rewards[row][valid] -= controller.coef * torch.tensor(kl, dtype=rewards.dtype)
    assert_matches(list(penalised.rewards), rewards.double().sum(1).tolist(), case.tolerance())
    metrics = {"actor/reward_kl_penalty": measured, "actor/reward_kl_penalty_coeff": controller.coef}
    controller.update(measured, len(mask))
    actual: dict[str, Any] = {"token_level_rewards": rewards, "metrics": metrics, "kl_coef_after": controller.coef}
    if case.expected is not None:
        assert_matches(actual, case.expected, case.tolerance())
