"""Packed attention on Ascend NPUs: `npu_fusion_attention` in TND layout, host-side lengths, no device synchronisation.

Written from the operator's signature (torch_npu 2.10); not run on a device yet. The operators are reached through
torch.ops, so that this file imports without torch_npu.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from dapo.model.layout import Ragged

_STATISTICS = 8
"""The kernel keeps each row's maximum and sum eight times."""


class NpuKernel:
    """Ragged attention; see `dapo.model.attention_split.Kernel`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Ragged, scale: float) -> tuple[Tensor, Tensor]:
        out, maximum, total, *_ = torch.ops.npu.npu_fusion_attention(
            q, k, v, q.shape[1], "TND", scale=scale, **_lengths_and_mask(problem, q.device)
        )
        return out, maximum[..., 0] + total[..., 0].log()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Ragged, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # exp(score - maximum) / sum with the joined log-sum-exp as maximum and a sum of one.
        maximum = lse[..., None].expand(-1, -1, _STATISTICS).contiguous()
        dq, dk, dv, *_ = torch.ops.npu.npu_fusion_attention_grad(
            q,
            k,
            v,
            grad,
            q.shape[1],
            "TND",
            softmax_max=maximum,
            softmax_sum=torch.ones_like(maximum),
            attention_in=out,
            scale_value=scale,
            **_lengths_and_mask(problem, q.device),
        )
        return dq, dk, dv


def _lengths_and_mask(problem: Ragged, device: torch.device) -> dict[str, Any]:
    # Mode 3 is causal aligned to the lower right; for problems of equal lengths the same as to the upper left.
    causal = {"sparse_mode": 3, "atten_mask": _compressed_mask(device)} if problem.causal else {"sparse_mode": 0}
    # Without `softmax_layout` the statistics lie heads first in memory whatever their shape says.
    return {
        "actual_seq_qlen": problem.query_ends,
        "actual_seq_kvlen": problem.key_ends,
        "softmax_layout": "TND",
        **causal,
    }


@cache
def _compressed_mask(device: torch.device) -> Tensor:
    """The one mask that stands for a causal mask of any size."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu_(1)
