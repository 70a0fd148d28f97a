"""Engine against trainer: both compute log-probabilities of the same tokens, with different kernels and results.

The gap between them makes on-policy data slightly off-policy. It is always measured; `correction` reweighs for it.
Source: truncated importance sampling, https://fengyao.notion.site/off-policy-rl (2025); masked: arXiv 2510.18855.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dapo.algo.aggregate import sequence_sum
from dapo.algo.loss import MAX_LOG_RATIO
from dapo.config.algorithm import CorrectionConfig

GAP_BINS = 70
# log10 nats of the lowest bin; the highest ends at 10 nats.
GAP_FLOOR = -6


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, sequence_ids: Tensor, num_sequences: int, config: CorrectionConfig
) -> Tensor:
    """Factor of each token's policy loss: trainer's over engine's probability, kept inside bounds.

    Args:
        old_logprobs, rollout_logprobs: [N], nats, the same weights as seen by trainer and engine.

    Returns:
        [N], no gradient. Per token pi_old / pi_rollout, or with ``level: sequence`` the product over the sequence.
        ``truncate``: min(w, high). ``mask``: w inside [low, high], 0 outside (the denominators stay as they are).
        ``off``: 1. Where the quotient is not finite: 0, except with ``off``.
    """
    if config.kind == "off":
        return torch.ones_like(old_logprobs)
    log_weights = (old_logprobs - rollout_logprobs).detach()
    if config.level == "sequence":
        log_weights = sequence_sum(log_weights, sequence_ids, num_sequences)[sequence_ids]
    # A token that one of the two calls impossible (or NaN) says nothing about the policy: weight 0.
    finite = log_weights.isfinite()
    weights = log_weights.where(finite, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * finite
    if config.kind == "truncate":
        return weights.clamp(max=config.high)
    return torch.where((weights >= config.low) & (weights <= config.high), weights, 0.0)


def effective_sample_share(weight_sum: float, weight_square_sum: float, count: float) -> float:
    """``(sum w)^2 / (n sum w^2)`` in (0, 1]: the share of the sample that still counts under n > 0 weights w > 0."""
    return weight_sum**2 / (count * weight_square_sum)


def gap_histogram(old_logprobs: Tensor, rollout_logprobs: Tensor, valid: Tensor) -> Tensor:
    """|old - rollout| of the valid tokens, counted in `GAP_BINS` bins of a tenth of a decade: [N] -> [GAP_BINS].

    Counts add up over packs and ranks, where quantiles do not.
    """
    gap = (old_logprobs - rollout_logprobs).detach().abs().nan_to_num(nan=torch.inf)
    bins = ((gap.log10() - GAP_FLOOR) * 10).clamp(0, GAP_BINS - 1).long()
    return gap.new_zeros(GAP_BINS).index_add(0, bins, valid.to(gap.dtype))


def histogram_quantile(histogram: Tensor, share: float) -> float:
    """Upper edge of the bin that holds this quantile, nats: too high by up to 26 %; 0 if it is in the lowest bin."""
    cumulative = histogram.double().cumsum(0)
    index = int((cumulative < share * cumulative[-1]).sum())
    return 0.0 if index == 0 else float(10 ** (GAP_FLOOR + (index + 1) / 10))
