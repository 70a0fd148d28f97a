"""The objective of one update: the one function that the training engine calls, once per pack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dapo.algo.aggregate import Totals, token_weights
from dapo.algo.correction import effective_sample_share, gap_histogram, histogram_quantile, importance_weights
from dapo.algo.kl import kl_estimate
from dapo.algo.loss import MAX_LOG_RATIO, TokenLoss, log_ratio, policy_loss
from dapo.config.algorithm import AlgorithmConfig

__all__ = ["ObjectiveResult", "TokenBatch", "Totals", "merge_sums", "policy_objective", "reduce_metrics"]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The response tokens of one pack: N tokens of S whole sequences, flat, one float type, one device.

    What stands at tokens of untrained sequences never matters, NaN included. A sequence is never split over two
    batches: under sequence parallelism gather the log-probabilities (N floats) first.
    """

    logprobs: Tensor
    """[N] float32, nats, of the current policy, with gradient."""
    old_logprobs: Tensor
    """[N] of the trainer before the first update of the step. For the first update pass ``logprobs.detach()``."""
    rollout_logprobs: Tensor
    """[N] of the engine while sampling."""
    advantages: Tensor
    """[N]; a sequence's advantage at each of its tokens: ``advantage_S[sequence_ids]``."""
    sequence_ids: Tensor
    """[N] int64, 0 .. S - 1; sequences without tokens are allowed."""
    trained: Tensor
    """[S] bool; False: outside of the loss and of its denominators. All False: a filler pack."""
    ref_logprobs: Tensor | None = None
    """[N] of the reference policy; needed where ``algorithm.kl.loss_coef > 0``."""
    entropy: Tensor | None = None
    """[N] nats, with gradient where ``algorithm.entropy_coef > 0``; needed there, else only reported."""


@dataclass(frozen=True, slots=True)
class ObjectiveResult:
    """What one pack adds to its update."""

    loss: Tensor
    """Scalar with gradient. The update's loss is the plain sum of these over all packs of all ranks: call backward on
    each and add gradients up, without a division by ranks or packs."""
    sums: dict[str, Tensor]
    """Without gradient, the same keys, order and shapes for every pack: for `merge_sums`. 0-d, but `gap_histogram`."""


def policy_objective(tokens: TokenBatch, config: AlgorithmConfig, totals: Totals) -> ObjectiveResult:
    """Policy loss - entropy_coef * entropy + kl.loss_coef * KL, aggregated with the denominators of the whole update.

    Per token: `policy_loss` times `importance_weights`, plus the entropy and KL terms, times `token_weights`.
    The gradient is the same for every split of the update's sequences over packs and ranks, but for ``clip_cov`` and
    ``kl_cov``: these rank tokens by their covariance within the pack, because the means over the update are not known
    before all of its forward passes are done and a second pass would cost as much as the first.

    Returns:
        With no trained token: loss 0 with gradient 0, never NaN (see ``empty_update`` of `reduce_metrics`).

    Source: DAPO, arXiv 2503.14476, equation 8; docs/algorithm.md.
    """
    t = tokens
    valid = t.trained[t.sequence_ids]
    count = valid.numel()
    assert t.logprobs.shape == t.old_logprobs.shape == t.rollout_logprobs.shape == t.advantages.shape == (count,), (
        f"logprobs {tuple(t.logprobs.shape)}, old {tuple(t.old_logprobs.shape)}, rollout "
        f"{tuple(t.rollout_logprobs.shape)} and advantages {tuple(t.advantages.shape)} must all be [{count}]"
    )
    logprobs, old, rollout, advantages = (
        torch.where(valid, x, 0.0) for x in (t.logprobs, t.old_logprobs, t.rollout_logprobs, t.advantages)
    )
    log_ratios = log_ratio(logprobs, old)
    per_token = policy_loss(logprobs, log_ratios, advantages, t.sequence_ids, t.trained, config.loss)
    corrections = importance_weights(old, rollout, t.sequence_ids, t.trained.numel(), config.correction)
    weights = token_weights(config.aggregation, t.sequence_ids, t.trained, totals, logprobs.dtype)

    policy = (per_token.loss * corrections * weights).sum()
    loss = policy
    entropy = torch.zeros_like(logprobs)
    if t.entropy is not None:
        entropy = torch.where(valid, t.entropy, 0.0)
    if config.entropy_coef:
        assert t.entropy is not None, "algorithm.entropy_coef > 0 needs the entropy of every token"
        loss = loss - config.entropy_coef * (entropy * weights).sum()
    kl = policy.new_zeros(())
    if config.kl.loss_coef:
        assert t.ref_logprobs is not None, "algorithm.kl.loss_coef > 0 needs the reference's log-probabilities"
        kl_tokens = kl_estimate(logprobs, torch.where(valid, t.ref_logprobs, 0.0), config.kl.kind)
        kl = (kl_tokens * weights).sum()
        loss = loss + config.kl.loss_coef * kl

    sums = {"loss": loss, "policy_loss": policy, "kl_loss": kl}
    sums |= _token_sums(valid, per_token, logprobs, log_ratios, entropy, old, rollout, corrections)
    # bfloat16 cannot count beyond 256.
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    return ObjectiveResult(loss, {name: value.detach().to(dtype) for name, value in sums.items()})


@torch.no_grad()
def _token_sums(
    valid: Tensor,
    token_loss: TokenLoss,
    logprobs: Tensor,
    log_ratios: Tensor,
    entropy: Tensor,
    old: Tensor,
    rollout: Tensor,
    corrections: Tensor,
) -> dict[str, Tensor]:
    """What `reduce_metrics` needs of the tokens. At tokens that are not valid everything given is 0, but the weights
    `corrections`; so no bound holds them."""
    gap = old - rollout
    gap_weights = torch.where(valid, gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), 0.0)
    ratio_errors = (log_ratios.exp() - 1).abs()
    return {
        "tokens": valid.sum(),
        "entropy": entropy.sum(),
        "approx_kl": -log_ratios.sum(),
        "clip_high": token_loss.clipped_high.sum(),
        "clip_low": token_loss.clipped_low.sum(),
        "clip_dual": token_loss.clipped_dual.sum(),
        "clipped_probability": torch.where(token_loss.clipped_high, logprobs.exp(), 0.0).sum(),
        "gap_mean": gap.abs().sum(),
        "gap_weight": gap_weights.sum(),
        "gap_weight_square": gap_weights.square().sum(),
        "gap_histogram": gap_histogram(old, rollout, valid),
        "correction": torch.where(valid, corrections, 0.0).sum(),
        "max_ratio_error": torch.cat([ratio_errors, ratio_errors.new_zeros(1)]).max(),
    }


def merge_sums(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`ObjectiveResult.sums` of several packs or ranks as one: added, but the maximum of what begins with ``max_``."""
    merged: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            else:
                merged[name] = torch.maximum(merged[name], value) if name.startswith("max_") else merged[name] + value
    return merged


def reduce_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The merged sums of one update (all packs, all ranks) as numbers to log.

    Returns:
        ``loss``, ``policy_loss``, ``kl_loss`` as they are; ``tokens`` trained on; ``empty_update``, 1 where there were
        none; ``max_ratio_error``, largest |ratio - 1|, exactly 0 in the first update. What has nothing to be measured
        on is absent: where tokens were trained, ``entropy`` (mean, nats), ``approx_kl`` (mean of log pi_old - log pi,
        nats), ``correction`` (mean importance weight), shares of tokens ``clip_high``, ``clip_low``, ``clip_dual``,
        and engine against trainer ``gap_mean``, ``gap_p99`` (of |difference|, nats), ``gap_ess`` (effective sample
        share); where tokens were clipped from above, ``clipped_probability``, their mean current probability.
    """
    s = {name: float(value) for name, value in sums.items() if name != "gap_histogram"}
    tokens = s["tokens"]
    metrics = {name: s[name] for name in ("loss", "policy_loss", "kl_loss", "tokens", "max_ratio_error")}
    metrics["empty_update"] = float(tokens == 0)
    if tokens:
        means = ("entropy", "approx_kl", "correction", "clip_high", "clip_low", "clip_dual", "gap_mean")
        metrics |= {name: s[name] / tokens for name in means}
        metrics["gap_p99"] = histogram_quantile(sums["gap_histogram"], 0.99)
        metrics["gap_ess"] = effective_sample_share(s["gap_weight"], s["gap_weight_square"], tokens)
    if s["clip_high"]:
        metrics["clipped_probability"] = s["clipped_probability"] / s["clip_high"]
    return metrics
