"""Packed attention by small dense blocks: fastest on CPU where contexts are short, and right on every device and dtype.

Rows of about equal length are batched. Memory is rows x queries x keys, so it serves contexts up to `MAX_CONTEXT`
tokens; longer ones go to `attention_split`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dapo.model.layout import PackLayout

MAX_CONTEXT = 256
"""Keys per query up to which blocks are used: the scores of a token then take about as much memory as its MLP does."""
_WASTE, _FREE_CELLS = 1.3, 20_000
"""A batch of rows is split where padding makes its scores this much larger, and by more cells than another handful of
kernel launches costs."""


@dataclass(frozen=True)
class _Block:
    """Rows padded to the same number of queries and keys."""

    query_rows: Tensor
    """[B * K * G * Lq] rows of queries seen as [N * H, D]; padding points at row 0 and is never read back."""
    key_rows: Tensor
    """[B * K * Lk] rows of keys seen as [N * K, D]; padding is masked."""
    mask: Tensor
    """[B * K, G * Lq, Lk] added to the scores: 0 or -inf."""


@dataclass(frozen=True)
class _Plan:
    blocks: tuple[_Block, ...]
    out_rows: Tensor
    """[N * H] where each output row lies in the concatenated outputs of the blocks."""


def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, scale: float) -> Tensor:
    """Attention of a pack.

    Args:
        q: [N, H, D]. k, v: [N, K, D].

    Returns:
        [N, H, D].
    """
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    key = ("short", heads, kv_heads, q.dtype, q.device)
    if key not in layout.kernels:
        layout.kernels[key] = _plan(layout, heads, kv_heads, q.dtype, q.device)
    plan: _Plan = layout.kernels[key]
    flat_q, flat_k, flat_v = (x.reshape(-1, width) for x in (q * scale, k, v))
    outputs = []
    for block in plan.blocks:
        batch, queries, keys = block.mask.shape
        rows_q = flat_q.index_select(0, block.query_rows).view(batch, queries, width)
        rows_k = flat_k.index_select(0, block.key_rows).view(batch, keys, width)
        rows_v = flat_v.index_select(0, block.key_rows).view(batch, keys, width)
        scores = torch.baddbmm(block.mask, rows_q, rows_k.transpose(1, 2))
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        outputs.append(torch.bmm(weights, rows_v).view(-1, width))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out.index_select(0, plan.out_rows).view(tokens, heads, width)


def _plan(layout: PackLayout, heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device) -> _Plan:
    rows = _rows(layout)
    groups = heads // kv_heads
    blocks, out_rows, start = [], torch.empty(layout.tokens, heads, dtype=torch.long), 0
    head = torch.arange(heads).view(1, kv_heads, groups, 1)
    for batch in _batches(rows):
        queries, keys = max(r[1] for r in batch), max(r[3] + r[4] for r in batch)
        first_q, n_q, first_prefix, n_prefix, n_own = (torch.tensor(x)[:, None] for x in zip(*batch, strict=True))
        at_q, at_k = torch.arange(queries), torch.arange(keys)
        real_q = at_q < n_q
        q_token = torch.where(real_q, first_q + at_q, 0)
        own_k = at_k - n_prefix
        k_token = torch.where(own_k < 0, first_prefix + at_k, first_q + own_k)
        real_k = own_k < n_own
        q_rows = q_token[:, None, None, :] * heads + head
        k_rows = torch.where(real_k, k_token, 0)[:, None, :] * kv_heads + torch.arange(kv_heads)[:, None]
        seen = real_k[:, None, :].expand(-1, queries, -1)
        if layout.causal:
            seen = seen & (own_k[:, None, :] <= at_q[None, :, None])
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
        mask = mask[:, None, None].expand(-1, kv_heads, groups, -1, -1).reshape(-1, groups * queries, keys)
        blocks.append(_Block(q_rows.flatten().to(device), k_rows.flatten().to(device), mask.to(device)))
        slots = torch.arange(start, start + q_rows.numel()).view(len(batch), heads, queries)
        out_rows[q_token[real_q]] = slots.transpose(1, 2)[real_q]
        start += q_rows.numel()
    return _Plan(tuple(blocks), out_rows.flatten().to(device))


_Row = tuple[int, int, int, int, int]
"""first query token, queries, first prefix token, prefix tokens, own keys"""


def _rows(layout: PackLayout) -> list[_Row]:
    rows, start = [], 0
    firsts = []
    for length in layout.prompts:
        firsts.append(start)
        rows.append((start, length, start, 0, length))
        start += length
    for first, prompt, lengths in zip(firsts, layout.prompts, layout.responses, strict=False):
        for length in lengths:
            rows.append((start, length, first, prompt, length))
            start += length
    return [row for row in rows if row[1]]


def _batches(rows: list[_Row]) -> list[list[_Row]]:
    """Rows by size, cut where padding the smaller ones to the larger would waste too much."""
    batches: list[list[_Row]] = []
    real, keys = 0, 0
    for row in sorted(rows, key=lambda r: (r[3] > 0, r[1], r[3] + r[4])):
        _, queries, _, prefix, own = row
        cells = queries * (prefix + own)
        if batches and (prefix > 0) == (batches[-1][0][3] > 0):
            keys = max(keys, prefix + own)
            padded = (len(batches[-1]) + 1) * queries * keys  # sorted: this row has the most queries so far
            if padded <= max(_WASTE * (real + cells), real + cells + _FREE_CELLS):
                batches[-1].append(row)
                real += cells
                continue
        batches.append([row])
        real, keys = cells, prefix + own
    return batches
