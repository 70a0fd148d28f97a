"""Laws of the single functions: advantages, surrogate, KL, entropy, overlong penalty, importance weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dapo.algo.advantage import AdvantageKind, group_advantages
from dapo.algo.correction import effective_sample_share, importance_weights
from dapo.algo.entropy import logprobs_and_entropy
from dapo.algo.kl import kl_estimate
from dapo.algo.loss import clipped_surrogate
from dapo.algo.overlong import soft_overlong_penalty
from dapo.config.algorithm import ClipConfig, CorrectionConfig

KINDS: tuple[AdvantageKind, ...] = ("grpo", "dr_grpo", "rloo")
reward = st.floats(-10, 10, allow_nan=False)
log_ratio = st.floats(-3, 3, allow_nan=False)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(2, 40), st.sampled_from(KINDS))
def test_equal_rewards_give_exactly_zero(value: float, size: int, kind: AdvantageKind) -> None:
    assert group_advantages([value] * size, kind) == [0.0] * size


@given(st.lists(reward, min_size=2, max_size=16), st.floats(0.01, 100), reward)
def test_the_normalised_advantage_does_not_change_with_affine_rewards(
    rewards: list[float], scale: float, shift: float
) -> None:
    assume(max(rewards) - min(rewards) > 1e-3)
    moved = group_advantages([scale * r + shift for r in rewards], "grpo", epsilon=0.0)
    assert moved == pytest.approx(group_advantages(rewards, "grpo", epsilon=0.0), rel=1e-6, abs=1e-6)


@given(st.lists(reward, min_size=2, max_size=16), st.sampled_from(KINDS))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(rewards: list[float], kind: AdvantageKind) -> None:
    advantages = group_advantages(rewards, kind)
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-8)
    ranked = [a for _, a in sorted(zip(rewards, advantages, strict=True))]
    assert ranked == sorted(ranked)


@given(st.lists(reward, min_size=2, max_size=16))
def test_leave_one_out_is_the_reward_against_the_mean_of_the_others(rewards: list[float]) -> None:
    total = math.fsum(rewards)
    expected = [r - (total - r) / (len(rewards) - 1) for r in rewards]
    assert group_advantages(rewards, "rloo") == pytest.approx(expected, abs=1e-9)


@given(log_ratio, st.floats(-5, 5, allow_nan=False), st.floats(0.01, 0.9), st.floats(0.01, 3.0))
def test_the_surrogate_is_the_plain_one_inside_the_bounds(d: float, a: float, low: float, high: float) -> None:
    log_ratios = torch.tensor([d], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([a], dtype=torch.float64)
    result = clipped_surrogate(log_ratios, advantages, ClipConfig(low=low, high=high, dual=None))
    (gradient,) = torch.autograd.grad(result.loss.sum(), log_ratios)
    ratio = math.exp(d)
    if 1 - low <= ratio <= 1 + high:
        assert result.loss.item() == pytest.approx(-a * ratio, rel=1e-12)
        assert gradient.item() == pytest.approx(-a * ratio, rel=1e-12)
        assert not (result.clipped_high | result.clipped_low).any()
    # PPO's formula, written out: the pessimistic of the two.
    expected = max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))
    assert result.loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert gradient.item() == 0.0 or gradient.item() == pytest.approx(-a * ratio, rel=1e-12)


@given(st.floats(-20, 20, allow_nan=False), st.floats(-5, -0.01), st.floats(1.5, 20))
def test_dual_clip_bounds_the_loss_of_a_negative_advantage(d: float, a: float, dual: float) -> None:
    clip = ClipConfig(dual=dual)
    loss = clipped_surrogate(torch.tensor([d], dtype=torch.float64), torch.tensor([a], dtype=torch.float64), clip).loss
    assert loss.item() <= -a * dual * (1 + 1e-12)


@given(st.integers(0, 400), st.integers(1, 200), st.integers(1, 200), st.floats(0, 5, allow_subnormal=False))
def test_the_overlong_penalty_is_monotone_and_bounded(length: int, buffer: int, more: int, factor: float) -> None:
    settings_ = {"max_length": 200, "buffer": buffer, "factor": factor}
    here, longer = (soft_overlong_penalty(n, **settings_) for n in (length, length + more))  # type: ignore[arg-type]
    assert -factor <= longer <= here <= 0.0
    assert (here == 0.0) == (length <= 200 - buffer or factor == 0.0)
    assert soft_overlong_penalty(200, **settings_) == -factor  # type: ignore[arg-type]


@given(st.lists(st.tuples(log_ratio, log_ratio), min_size=1, max_size=8), st.sampled_from(["k1", "k2", "k3", "abs"]))
def test_kl_is_zero_at_equality_and_plus_changes_only_the_gradient(pairs: list[tuple[float, float]], kind: str) -> None:
    p, q = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs, strict=True))
    value = kl_estimate(p, q, kind)  # type: ignore[arg-type]
    assert kind == "k1" or (value >= -1e-15).all()
    assert torch.equal(kl_estimate(p, p, kind), torch.zeros_like(p))  # type: ignore[arg-type]
    straight = p.clone().requires_grad_()
    result = kl_estimate(straight, q, f"{kind}+")  # type: ignore[arg-type]
    torch.testing.assert_close(result.detach(), value)
    (gradient,) = torch.autograd.grad(result.sum(), straight)
    torch.testing.assert_close(gradient, p - q)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(0.1, 3.0), st.sets(st.integers(0, 9), max_size=4))
def test_logprobs_and_entropy_are_those_of_the_sampling_distribution(seed: int, t: float, banned: set[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(3, 10, generator=generator, dtype=torch.float64)).requires_grad_()
    allowed = [i for i in range(10) if i not in banned]
    columns = [logprobs_and_entropy(logits, torch.full((3,), i), t, banned_ids=sorted(banned)) for i in range(10)]
    p = torch.stack([c[0] for c in columns], dim=-1).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(p[:, sorted(banned)], torch.zeros(3, len(banned), dtype=torch.float64))
    torch.testing.assert_close(
        p,
        (logits[:, allowed] / t)
        .softmax(-1)
        .new_zeros(3, 10)
        .index_copy(1, torch.tensor(allowed), (logits[:, allowed] / t).softmax(-1)),
    )
    entropy = columns[0][1]
    torch.testing.assert_close(entropy, -(p[:, allowed] * p[:, allowed].log()).sum(-1))
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert torch.isfinite(gradient).all()
    assert torch.equal(gradient[:, sorted(banned)], torch.zeros(3, len(banned), dtype=torch.float64))


def test_gradients_of_logprobs_and_entropy_agree_with_differences() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, 2, 3])
    assert torch.autograd.gradcheck(lambda x: logprobs_and_entropy(x, labels, 0.7, banned_ids=(1,)), (logits,))


@settings(max_examples=50)
@given(
    st.lists(st.tuples(log_ratio, log_ratio, st.integers(0, 3)), min_size=1, max_size=12),
    st.sampled_from(["token", "sequence"]),
    st.sampled_from(["truncate", "mask"]),
)
def test_importance_weights_stay_inside_their_bounds(
    tokens: list[tuple[float, float, int]], level: str, kind: str
) -> None:
    old, rollout, ids = zip(*tokens, strict=True)
    config = CorrectionConfig(kind=kind, level=level, low=0.5, high=2.0)  # type: ignore[arg-type]
    a, b = torch.tensor(old, dtype=torch.float64), torch.tensor(rollout, dtype=torch.float64)
    weights = importance_weights(a, b, torch.tensor(ids), 4, config)
    assert ((weights >= 0) & (weights <= 2.0)).all()
    assert kind == "truncate" or ((weights == 0) | (weights >= 0.5)).all()
    assert torch.equal(importance_weights(a, a, torch.tensor(ids), 4, config), torch.ones_like(a))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=50))
def test_the_effective_sample_share_lies_between_one_token_and_all(weights: list[float]) -> None:
    share = effective_sample_share(math.fsum(weights), math.fsum(w * w for w in weights), len(weights))
    assert 1 / len(weights) * (1 - 1e-9) <= share <= 1 + 1e-9
    assert effective_sample_share(3.0, 3.0, 3) == 1.0
