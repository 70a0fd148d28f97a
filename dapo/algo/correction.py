"""Engine against trainer: both compute log-probabilities of the same tokens, with other kernels and so other results.

The gap between them makes on-policy data slightly off-policy. It is always measured; `correction` reweighs for it.
Source: truncated importance sampling, https://fengyao.notion.site/off-policy-rl (2025); masked: arXiv 2510.18855.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dapo.algo.aggregate import sequence_sum
from dapo.algo.loss import MAX_LOG_RATIO
from dapo.config.algorithm import CorrectionConfig


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, sequence_ids: Tensor, num_sequences: int, config: CorrectionConfig
) -> Tensor:
    """Factor of each token's policy loss: trainer's over engine's probability, kept inside bounds.

    Args:
        old_logprobs, rollout_logprobs: [N], nats, the same weights as seen by trainer and engine.

    Returns:
        [N], no gradient. Per token pi_old / pi_rollout, or with ``level: sequence`` the product over the sequence.
        ``truncate``: min(w, high). ``mask``: w inside [low, high], 0 outside (the denominators stay as they are).
        ``off``: 1.
    """
    if config.kind == "off":
        return torch.ones_like(old_logprobs)
    log_weights = (old_logprobs - rollout_logprobs).detach()
    if config.level == "sequence":
        log_weights = sequence_sum(log_weights, sequence_ids, num_sequences)[sequence_ids]
    weights = log_weights.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if config.kind == "truncate":
        return weights.clamp(max=config.high)
    return torch.where((weights >= config.low) & (weights <= config.high), weights, 0.0)


def effective_sample_share(weight_sum: float, weight_square_sum: float, count: float) -> float:
    """``(sum w)^2 / (n sum w^2)`` in (0, 1]: the share of the sample that still counts under weights w; 1 for n = 0."""
    return weight_sum**2 / (count * weight_square_sum) if count and weight_square_sum else 1.0


def gap_metrics(old_logprobs: Sequence[float], rollout_logprobs: Sequence[float]) -> dict[str, float]:
    """The gap over all tokens of a step, exactly: ``gap_mean`` and ``gap_p99`` of |difference| in nats, ``gap_ess``.

    Args:
        old_logprobs, rollout_logprobs: of the same tokens, in the same order; before the first update of the step.
    """
    old, rollout = (torch.tensor(x, dtype=torch.float64) for x in (old_logprobs, rollout_logprobs))
    if not old.numel():
        return {"gap_mean": 0.0, "gap_p99": 0.0, "gap_ess": 1.0}
    gap = (old - rollout).abs()
    rank = max(1, -(-99 * gap.numel() // 100))  # nearest rank; torch.quantile refuses more than 2^24 entries
    weights = (old - rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return {
        "gap_mean": float(gap.mean()),
        "gap_p99": float(gap.kthvalue(rank).values),
        "gap_ess": effective_sample_share(float(weights.sum()), float(weights.square().sum()), gap.numel()),
    }
