"""Log-probabilities and entropy of given tokens from hidden states, without ever holding all logits.

Logits are made in tiles of tokens times vocabulary and thrown away; the backward pass makes them again. What stays
alive is a few numbers per token. Softmax and sums are float32 (float64 for float64 input) whatever the model's dtype;
the products of a bfloat16 model reach them unrounded on CUDA, and rounded to bfloat16 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dapo.model.linear import product, rounded_rows

CPU_TILE = 2**22, 64
"""Logits alive at a time (16 MiB in float32), and the fewest tokens beside each other."""
ACCELERATOR_TILE = 2**26, 1024
"""256 MiB: each block of tokens reads and writes the gradient of the whole output matrix, so blocks must be few."""
_MASKED = -1e30
"""A banned logit: finite, so that 0 * log 0 is 0 and not NaN; its probability is exactly 0."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each target under softmax(hidden @ weight.T / temperature) over the ids that are not banned.

    Args:
        hidden: [N, H], the states that predict the targets; with gradient.
        weight: [V, H], the output matrix; with gradient.
        targets: [N] int64; none of them banned.
        temperature: of the sampling; above 0.
        banned: [V] bool, or None.
        tile: logits alive at a time, and at least so many rows of them; None: what suits the device.

    Returns:
        Log-probabilities and entropies [N], nats, float32 or wider, both with gradient.
    """
    tokens = len(targets)
    missing = rounded_rows(tokens, hidden) - tokens
    if missing:
        hidden, targets = functional.pad(hidden, (0, 0, 0, missing)), functional.pad(targets, (0, missing))
    tile = tile or (CPU_TILE if hidden.device.type == "cpu" else ACCELERATOR_TILE)
    logprobs, entropy = _TokenLogProbs.apply(hidden, weight, targets, temperature, banned, tile)
    # No views: FSDP puts its backward hooks on what leaves the network.
    return (logprobs[:tokens].clone(), entropy[:tokens].clone()) if missing else (logprobs, entropy)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        banned: Tensor | None,
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(tokens, dtype=wide, device=hidden.device)
        normaliser, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in _chunks(tokens, _row_chunk(tokens, vocabulary, tile)):
            top = total = weighted = chosen = None
            for columns in _chunks(vocabulary, _column_chunk(vocabulary, tile)):
                z = _logits(hidden[rows], weight, columns, temperature, banned, wide)
                at, here = _locate(targets[rows], columns)
                picked = torch.where(here, z.gather(1, at[:, None])[:, 0], 0.0)
                high = z.amax(1)
                new_top = high if top is None else torch.maximum(top, high)
                # Everything relative to the row's largest logit: entropy is a small difference of large numbers else.
                z -= new_top[:, None]
                p = z.exp()
                part, part_weighted = p.sum(1), torch.linalg.vecdot(p, z)
                if top is None or total is None or weighted is None or chosen is None:
                    total, weighted, chosen = part, part_weighted, picked
                else:
                    fall = top - new_top
                    shrink = fall.exp()
                    total, weighted = total * shrink + part, (weighted + total * fall) * shrink + part_weighted
                    chosen = chosen + picked
                top = new_top
            assert top is not None and total is not None and weighted is not None and chosen is not None  # noqa: PT018
            log_total = total.log()
            normaliser[rows] = top + log_total
            logprobs[rows] = chosen - top - log_total
            entropy[rows] = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, targets, banned, normaliser, entropy)
        ctx.temperature, ctx.tile, ctx.wide = temperature, tile, wide
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, banned, normaliser, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None, None
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden, dtype=ctx.wide) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=ctx.wide) if need_weight else None
        for rows in _chunks(tokens, _row_chunk(tokens, vocabulary, ctx.tile)):
            # By hand: d logprob / d z = onehot - p; d entropy / d z = -p (z - normaliser + entropy).
            g = 0.0 if grad_logprobs is None else grad_logprobs[rows, None]
            for columns in _chunks(vocabulary, _column_chunk(vocabulary, ctx.tile)):
                z = _logits(hidden[rows], weight, columns, ctx.temperature, banned, ctx.wide)
                z -= normaliser[rows, None]
                pull: Any = g
                if grad_entropy is not None:
                    pull = g + grad_entropy[rows, None] * (z + entropy[rows, None])
                dz = z.exp_().mul_(pull).neg_()
                if grad_logprobs is not None:
                    at, here = _locate(targets[rows], columns)
                    dz.scatter_add_(1, at[:, None], torch.where(here, grad_logprobs[rows], 0.0)[:, None])
                dz = dz.div_(ctx.temperature).to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[rows] += product(dz, weight[columns].T)
                if d_weight is not None:
                    d_weight[columns] += product(dz.T, hidden[rows].T)
        d_hidden = None if d_hidden is None else d_hidden.to(hidden.dtype)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None


def _logits(
    rows: Tensor, weight: Tensor, columns: slice, temperature: float, banned: Tensor | None, wide: torch.dtype
) -> Tensor:
    if rows.is_cuda and rows.dtype != wide:
        z = torch.mm(rows, weight[columns].T, out_dtype=wide)  # not rounded on the way out
    else:
        z = product(rows, weight[columns]).to(wide)
    if temperature != 1.0:
        z = z.div_(temperature)
    return z if banned is None else z.masked_fill_(banned[columns], _MASKED)


def _locate(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Column of each target inside the tile (0 where it lies elsewhere), and whether it lies inside."""
    here = (targets >= columns.start) & (targets < columns.stop)
    return torch.where(here, targets - columns.start, 0), here


def _column_chunk(vocabulary: int, tile: tuple[int, int]) -> int:
    size, rows = tile
    return max(1, min(vocabulary, size // rows))


def _row_chunk(tokens: int, vocabulary: int, tile: tuple[int, int]) -> int:
    return max(1, min(tokens, tile[0] // _column_chunk(vocabulary, tile)))


def _chunks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
