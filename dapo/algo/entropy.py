"""Log-probabilities and entropy from logits: the plain formula, against which the fused one is tested."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def logprobs_and_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, banned_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Of the distribution that the engine samples from: ``softmax(logits / temperature)`` without the banned ids.

    Args:
        logits: [..., V], any float type; computed in float32 at least. -inf entries have probability 0.
        labels: [...] int64, sampled ids.
        banned_ids: ids that are never sampled; they take no part in the softmax.

    Returns:
        ([...], [...]): log-probability of each label and entropy of each distribution, nats, with gradient.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if banned_ids:
        scaled = scaled.index_fill(-1, torch.tensor(banned_ids, device=logits.device), -torch.inf)
    logp = scaled.log_softmax(-1)
    # p log p is 0 at p = 0, but 0 * -inf is NaN, and so is its gradient: those entries are cut from the product.
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy
