"""How token losses become one number. Denominators are global, so any split over packs and ranks gives one gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dapo.config.algorithm import AggregationName


@dataclass(frozen=True, slots=True)
class Totals:
    """What one optimiser update trains on, over all its packs and all ranks."""

    tokens: int
    """Trained tokens."""
    sequences: int
    """Trained sequences with at least one token."""
    max_response_tokens: int
    """The constant length of `seq-mean-token-sum-norm`: the response limit, so that it does not depend on the data."""

    @staticmethod
    def of(lengths: Iterable[int], trained: Iterable[bool], max_response_tokens: int) -> Totals:
        """From the response length (tokens) and the `trained` flag of every sequence of the update."""
        counted = [length for length, flag in zip(lengths, trained, strict=True) if flag and length > 0]
        return Totals(sum(counted), len(counted), max_response_tokens)


def token_weights(
    mode: AggregationName, sequence_ids: Tensor, trained: Tensor, totals: Totals, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weight of each token in the update's loss: ``loss = sum(weights * token_losses)`` over all packs and ranks.

    With T trained tokens and S trained sequences in the update, |o_i| tokens in sequence i, and the constant F:
    ``token-mean`` 1 / T (DAPO section 3.3); ``seq-mean-token-mean`` 1 / (S |o_i|) (GRPO); ``seq-mean-token-sum`` 1 / S;
    ``seq-mean-token-sum-norm`` 1 / (S F) (Dr. GRPO, arXiv 2503.20783); ``token-sum`` 1.

    Args:
        sequence_ids: [N] int64; a sequence is never split over two calls.
        trained: [S] bool; tokens of other sequences weigh 0.

    Returns:
        [N] of `dtype`. All zero where nothing is trained: never a division by zero.
    """
    weights = trained[sequence_ids].to(dtype)
    tokens, sequences = max(totals.tokens, 1), max(totals.sequences, 1)
    match mode:
        case "token-mean":
            return weights / tokens
        case "seq-mean-token-sum":
            return weights / sequences
        case "seq-mean-token-mean":
            lengths = sequence_sum(torch.ones_like(weights), sequence_ids, trained.numel())
            return weights / (lengths[sequence_ids] * sequences)
        case "seq-mean-token-sum-norm":
            return weights / (sequences * totals.max_response_tokens)
        case "token-sum":
            return weights


def sequence_mean(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Mean over each sequence's tokens: [N] -> [S], with gradient; 0 for a sequence without tokens."""
    lengths = sequence_sum(torch.ones_like(values), sequence_ids, num_sequences)
    return sequence_sum(values, sequence_ids, num_sequences) / lengths.clamp(min=1)


def sequence_sum(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sum over each sequence's tokens: [N] -> [S], with gradient."""
    return values.new_zeros(num_sequences).index_add(0, sequence_ids, values)
