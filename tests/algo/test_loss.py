"""Policy losses by hand: one token, or a few, with numbers one can check."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dapo.algo.loss import TokenLoss, cispo, clip_cov, clipped_surrogate, covariance, gspo, kl_cov, log_ratio
from dapo.config.algorithm import CispoLossConfig, ClipConfig, ClipCovLossConfig, KlCovLossConfig

CLIP = ClipConfig(low=0.2, high=0.28, dual=10.0)


def logs(*ratios: float) -> Tensor:
    return torch.tensor([math.log(r) for r in ratios], dtype=torch.float64, requires_grad=True)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def gradient(loss: TokenLoss, of: Tensor) -> list[float]:
    return torch.autograd.grad(loss.loss.sum(), of)[0].tolist()


def test_clip_higher_holds_good_tokens_at_128_and_bad_ones_at_80_percent() -> None:
    ratios = logs(1.2, 1.5, 0.5, 0.5, 0.9, 1.5)
    result = clipped_surrogate(ratios, values(1, 1, 1, -1, -1, -1), CLIP)
    assert result.loss.tolist() == pytest.approx([-1.2, -1.28, -0.5, 0.8, 0.9, 1.5])
    assert gradient(result, ratios) == pytest.approx([-1.2, 0, -0.5, 0, 0.9, 1.5])
    assert result.clipped_high.tolist() == [False, True, False, False, False, False]
    assert result.clipped_low.tolist() == [False, False, False, True, False, False]


def test_dual_clip_caps_only_negative_advantages() -> None:
    ratios = logs(20, 20, 9)
    result = clipped_surrogate(ratios, values(-2, 1, -2), CLIP)
    assert result.loss.tolist() == pytest.approx([20.0, -1.28, 18.0])
    assert gradient(result, ratios) == pytest.approx([0, 0, 18])
    assert result.clipped_dual.tolist() == [True, False, False]


def test_the_log_ratio_is_limited_to_twenty_without_gradient() -> None:
    logprobs = values(700, -700, 1).requires_grad_()
    d = log_ratio(logprobs, torch.zeros(3, dtype=torch.float64))
    assert d.tolist() == [20, -20, 1]
    assert torch.autograd.grad(d.sum(), logprobs)[0].tolist() == [0, 0, 1]


def test_gspo_gives_a_sequence_one_ratio_the_geometric_mean() -> None:
    ratios = logs(1.1, 0.9, 4.0)
    ids = torch.tensor([0, 0, 1])
    result = gspo(ratios, values(1, 1, 1), ids, 2, ClipConfig(low=0.1, high=0.2, dual=None))
    s = math.sqrt(1.1 * 0.9)
    assert result.loss.tolist() == pytest.approx([-s, -s, -1.2])
    # The mean over the sequence's two tokens has gradient s / 2 per token: so the sum has s.
    assert gradient(result, ratios) == pytest.approx([-s, -s, 0])
    assert result.clipped_high.tolist() == [False, False, True]


def test_cispo_weighs_every_token_and_clips_only_the_weight() -> None:
    logprobs = values(-1.0, -1.0, -1.0).requires_grad_()
    ratios = logprobs - logs(2.0, 0.1, 1.0).detach().neg() + 1.0
    result = cispo(logprobs, ratios, values(1, 1, -2), CispoLossConfig(low=0.5, high=0.5))
    assert gradient(result, logprobs) == pytest.approx([-1.5, -0.5, 2.0])
    assert result.clipped_high.tolist() == [True, False, False]
    assert result.clipped_low.tolist() == [False, True, False]


def test_cispo_has_no_lower_bound_unless_asked() -> None:
    result = cispo(values(-1), logs(0.01), values(1), CispoLossConfig())
    assert result.loss.item() == pytest.approx(0.01)
    assert not result.clipped_low.any()


def test_covariance_is_centred_on_the_valid_tokens() -> None:
    valid = torch.tensor([True, True, False])
    cov = covariance(values(-1, -3, 50), values(1, -1, 50), valid)
    assert cov.tolist() == [1.0, 1.0, -math.inf]


def test_clip_cov_detaches_a_share_of_the_candidates_evenly_spaced() -> None:
    logprobs = values(-1, -1, -1, -1, -5, -5, -5, -5)
    advantages = values(1, 1, 1, 1, -1, -1, -1, -1)
    ratios = logs(*[1.0] * 8)
    config = ClipCovLossConfig(share=0.25, cov_low=1.0, cov_high=5.0)
    # Every covariance is 2 * 1 = 2: all eight are candidates, two are detached.
    result = clip_cov(ratios, logprobs, advantages, torch.ones(8, dtype=torch.bool), config)
    assert gradient(result, ratios) == pytest.approx([0, -1, -1, -1, 0, 1, 1, 1])
    assert result.loss.tolist() == pytest.approx((-advantages).tolist())


def test_clip_cov_leaves_tokens_alone_that_are_no_candidates() -> None:
    ratios = logs(1.0, 1.0)
    config = ClipCovLossConfig(share=0.5, cov_low=1.0, cov_high=5.0)
    result = clip_cov(ratios, values(-1, -1.1), values(1, -1), torch.ones(2, dtype=torch.bool), config)
    assert gradient(result, ratios) == pytest.approx([-1, 1])


def test_kl_cov_charges_the_tokens_of_highest_covariance() -> None:
    ratios = logs(1.1, 1.1, 0.9, 0.9)
    logprobs, advantages = values(-1, -2, -8, -3), values(1, 1, -1, -1)
    config = KlCovLossConfig(share=0.25, coef=2.0)
    result = kl_cov(ratios, logprobs, advantages, torch.ones(4, dtype=torch.bool), config)
    # Mean log-probability -3.5: covariances 2.5, 1.5, 4.5, -0.5; the third pays 2 |log 0.9|, with gradient -2.
    assert result.loss.tolist() == pytest.approx([-1.1, -1.1, 0.9 - 2 * math.log(0.9), 0.9])
    assert gradient(result, ratios) == pytest.approx([-1.1, -1.1, 0.9 - 2, 0.9])
