"""Ulysses sequence parallelism: tokens are split over ranks, and during attention heads are.

Before attention an all-to-all turns "some tokens, all heads" into "all tokens, some heads"; after it, back. Everything
else in the text model works token by token. Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapo.errors import ConfigError


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a pack."""

    group: Any
    rank: int
    size: int

    def bounds(self, tokens: int) -> tuple[int, int]:
        """This rank's tokens of a pack; the last rank's may end behind the pack (padding)."""
        share = -(-tokens // self.size)
        return self.rank * share, (self.rank + 1) * share


@dataclass(frozen=True)
class SequenceSlice:
    """What of a pack this rank computes."""

    group: SequenceGroup
    feature_rows: Tensor
    """Which of the pack's image features fall on its tokens."""
    target_rows: Tensor
    """Which of the pack's targets it scores."""
    targets: int
    """Targets of the whole pack."""


def check_heads(heads: int, size: int) -> None:
    """
    Raises:
        ConfigError: the heads cannot be split evenly over so many ranks.
    """
    if heads % size:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(
            f"model.parallel.sequence_parallel={size} must divide the model's {heads} attention heads; "
            f"try {', '.join(map(str, fits))}"
        )


def repeated_heads(kv_heads: int, size: int) -> int:
    """How often each key-value head is repeated so that they can be split evenly over `size` ranks."""
    return size // math.gcd(kv_heads, size)


def gather_tokens(x: Tensor, tokens: int, group: SequenceGroup) -> Tensor:
    """[n, h, D] of this rank's tokens and all heads to [N, h / size, D] of all tokens and this rank's heads."""
    gathered: Tensor = _Exchange.apply(x, group, True)
    return gathered[:tokens]


def scatter_tokens(x: Tensor, group: SequenceGroup) -> Tensor:
    """The way back: [N, h / size, D] to [n, h, D]."""
    missing = -x.shape[0] % group.size
    if missing:
        x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
    scattered: Tensor = _Exchange.apply(x, group, False)
    return scattered


def join_values(values: Tensor, part: SequenceSlice) -> Tensor:
    """Each rank's values of its targets to all values on every rank.

    Every rank then computes the same loss of all of them; the gradient that flows back into a rank's own values is
    complete, so it is not summed over ranks.
    """
    joined: Tensor = _Join.apply(values, part)
    return joined


def _exchange(x: Tensor, group: SequenceGroup, to_heads: bool) -> Tensor:
    """The all-to-all itself, in one direction or the other."""
    if to_heads:
        n, h, d = x.shape
        parts = x.view(n, group.size, h // group.size, d).transpose(0, 1).contiguous()
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=group.group)
        return out.view(group.size * n, h // group.size, d)
    parts = x.contiguous()
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=group.group)
    n = x.shape[0] // group.size
    return out.view(group.size, n, *x.shape[1:]).transpose(0, 1).reshape(n, -1, x.shape[2])


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _exchange(x, group, to_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grads[0], ctx.group, not ctx.to_heads), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, part: SequenceSlice) -> Tensor:
        ctx.rows = part.target_rows
        everything = values.new_zeros(part.targets).index_copy_(0, part.target_rows, values)
        dist.all_reduce(everything, group=part.group.group)
        return everything

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.rows), None
