"""Policy losses per token, to be minimised: the clipped surrogate of DAPO and the losses that replace it.

All take flat tokens ``[N]`` and are not yet averaged (dapo.algo.aggregate); the elementwise ones take any shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dapo.algo.aggregate import sequence_mean
from dapo.config.algorithm import CispoLossConfig, ClipConfig, ClipCovLossConfig, KlCovLossConfig, LossConfig

# exp(20) is 5e8: large enough to be clipped by any bound, small enough to stay finite in float32.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Token losses and which bound holds which ratio; all of the shape of the input."""

    loss: Tensor
    clipped_high: Tensor
    """bool: the ratio is above the upper bound, and the bound (not the ratio) is in the loss."""
    clipped_low: Tensor
    """bool: the same at the lower bound."""
    clipped_dual: Tensor
    """bool: the dual clip caps the loss of a negative advantage."""


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log of pi_theta / pi_old per token, nats, limited to +-20 (gradient 0 beyond)."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(log_ratios: Tensor, advantages: Tensor, clip: ClipConfig) -> TokenLoss:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)``, where A < 0 at most ``-dual A``.

    Args:
        log_ratios: any shape, nats, with gradient.
        advantages: the same shape, no gradient.

    Returns:
        The loss; its gradient is 0 where a bound is active and that of ``-r A`` elsewhere.

    Source: DAPO, arXiv 2503.14476, equations 8 and 10 (Clip-Higher); dual clip, arXiv 1912.09729.
    """
    ratio = log_ratios.exp()
    high = (advantages > 0) & (ratio > 1 + clip.high)
    low = (advantages < 0) & (ratio < 1 - clip.low)
    bounded = torch.where(high | low, ratio.detach().clamp(1 - clip.low, 1 + clip.high), ratio)
    if clip.dual is None:
        return TokenLoss(-advantages * bounded, high, low, torch.zeros_like(high))
    dual = (advantages < 0) & (ratio > clip.dual)
    return TokenLoss(-advantages * bounded.masked_fill(dual, clip.dual), high, low, dual)


def gspo(
    log_ratios: Tensor, advantages: Tensor, sequence_ids: Tensor, num_sequences: int, clip: ClipConfig
) -> TokenLoss:
    """The clipped surrogate with one ratio per sequence: ``s_i = exp(mean_t log r_it)``.

    Source: GSPO, arXiv 2507.18071, equations 5 to 7. Every token carries its sequence's loss, so a mean over the
    tokens of a sequence is the paper's loss of that sequence (`aggregation: seq-mean-token-mean`).
    """
    mean = sequence_mean(log_ratios, sequence_ids, num_sequences)
    return clipped_surrogate(mean[sequence_ids], advantages, clip)


def cispo(logprobs: Tensor, log_ratios: Tensor, advantages: Tensor, config: CispoLossConfig) -> TokenLoss:
    """``-sg(clip(r, 1 - low, 1 + high)) A log pi``: clipping bounds the weight, and no token loses its gradient.

    Source: CISPO in MiniMax-M1, arXiv 2506.13585, section 3.1.
    """
    ratio = log_ratios.detach().exp()
    floor = 0.0 if config.low is None else 1 - config.low
    weight = ratio.clamp(floor, 1 + config.high)
    return TokenLoss(
        loss=-weight * advantages * logprobs,
        clipped_high=ratio > 1 + config.high,
        clipped_low=ratio < floor,
        clipped_dual=torch.zeros_like(ratio, dtype=torch.bool),
    )


def covariance(logprobs: Tensor, advantages: Tensor, valid: Tensor) -> Tensor:
    """Each valid token's part of the covariance of log-probability and advantage; -inf where not valid. No gradient.

    ``(log pi_t - mean log pi) (A_t - mean A)``, means over the valid tokens given. Its sum drives the fall of entropy.
    Source: arXiv 2505.22617, section 4.
    """
    x, a = logprobs.detach(), advantages
    count = valid.sum().clamp(min=1)
    x = x - torch.where(valid, x, 0).sum() / count
    a = a - torch.where(valid, a, 0).sum() / count
    return (x * a).masked_fill(~valid, -torch.inf)


def clip_cov(
    log_ratios: Tensor, logprobs: Tensor, advantages: Tensor, valid: Tensor, config: ClipCovLossConfig
) -> TokenLoss:
    """The clipped surrogate; a share of the tokens with covariance between the bounds lose their gradient.

    Detached are ``max(1, share * valid)`` of the candidates that no bound holds, evenly spaced in token order: as blind
    to content as the paper's random choice, and the same when a step is done again.
    Source: Clip-Cov, arXiv 2505.22617, section 4.
    """
    base = clipped_surrogate(log_ratios, advantages, config.clip)
    cov = covariance(logprobs, advantages, valid)
    free = ~(base.clipped_high | base.clipped_low | base.clipped_dual)
    candidates = torch.nonzero((cov > config.cov_low) & (cov < config.cov_high) & free).flatten()
    wanted = min(_share(valid, config.share), candidates.numel())
    spaced = torch.arange(wanted, device=cov.device) * candidates.numel() // max(wanted, 1)
    chosen = torch.zeros_like(valid).index_fill(0, candidates[spaced], True)
    loss = torch.where(chosen, base.loss.detach(), base.loss)
    return TokenLoss(loss, base.clipped_high, base.clipped_low, base.clipped_dual)


def kl_cov(
    log_ratios: Tensor, logprobs: Tensor, advantages: Tensor, valid: Tensor, config: KlCovLossConfig
) -> TokenLoss:
    """``-r A``; the ``max(1, share * valid)`` tokens of the highest covariance pay ``coef * |log r|`` besides.

    Source: KL-Cov, arXiv 2505.22617, section 4.
    """
    cov = covariance(logprobs, advantages, valid)
    wanted = min(_share(valid, config.share), int(valid.sum()))
    chosen = torch.zeros_like(valid).index_fill(0, cov.argsort(descending=True, stable=True)[:wanted], True)
    never = torch.zeros_like(valid)
    penalty = torch.where(chosen, config.coef * log_ratios.abs(), 0.0)
    return TokenLoss(-log_ratios.exp() * advantages + penalty, never, never, never)


def _share(valid: Tensor, share: float) -> int:
    return max(1, int(share * int(valid.sum())))


def policy_loss(
    logprobs: Tensor,
    log_ratios: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    trained: Tensor,
    config: LossConfig,
) -> TokenLoss:
    """The loss that the configuration names. [N] each, but `trained` [S] bool; see the functions above."""
    match config.kind:
        case "dapo":
            return clipped_surrogate(log_ratios, advantages, config.clip)
        case "gspo":
            return gspo(log_ratios, advantages, sequence_ids, trained.numel(), config.clip)
        case "cispo":
            return cispo(logprobs, log_ratios, advantages, config)
        case "clip_cov":
            return clip_cov(log_ratios, logprobs, advantages, trained[sequence_ids], config)
        case "kl_cov":
            return kl_cov(log_ratios, logprobs, advantages, trained[sequence_ids], config)
