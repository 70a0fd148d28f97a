"""Packed attention by ragged flash kernels: memory linear in tokens, any context length.

Shared-prefix attention is three ragged problems: prompt on prompt, response on prompt, response on itself. A response's
two partial results are joined by their log-sum-exp. A flash backward needs only the final output and the final
log-sum-exp of a row to give the right gradient of each part, so the parts' backwards are two plain kernel calls and
their sums are exact: no approximation anywhere.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from dapo.model.attention_short import MAX_CONTEXT
from dapo.model.layout import PackLayout, Ragged


class Kernel(Protocol):
    """Attention over a ragged problem. q is [Nq, H, D], k and v are [Nk, K, D], lse is [Nq, H] in nats."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Ragged, scale: float) -> tuple[Tensor, Tensor]:
        """(output [Nq, H, D], lse)"""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Ragged, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of this problem's keys, where `out` and `lse` are of all keys a row sees."""
        ...


def kernel_for(q: Tensor, layout: PackLayout) -> Kernel | None:
    """The kernel for this device, dtype and length; None: short blocks do better, or there is no kernel."""
    if q.device.type == "cpu":
        return CpuKernel() if layout.longest_context > MAX_CONTEXT else None
    if q.device.type == "npu":
        from dapo.model.attention_npu import NpuKernel

        return NpuKernel()
    return CudaKernel() if q.dtype in (torch.bfloat16, torch.float16) else None


def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, scale: float, kernel: Kernel) -> Tensor:
    """Attention of a pack.

    Args:
        q: [N, H, D]. k, v: [N, K, D].

    Returns:
        [N, H, D].
    """
    out: Tensor = _SharedPrefix.apply(q, k, v, layout, scale, kernel)
    return out


class _SharedPrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, scale: float, kernel: Kernel) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        p = layout.prompt_tokens
        out, lse = kernel.forward(q[:p], k[:p], v[:p], layout.within_prompts, scale)
        if layout.has_responses:
            of_prompt, lse_prompt = kernel.forward(q[p:], k[:p], v[:p], layout.responses_to_prompts, scale)
            of_self, lse_self = kernel.forward(q[p:], k[p:], v[p:], layout.within_responses, scale)
            joined = torch.logaddexp(lse_prompt, lse_self)
            share = (lse_prompt - joined).exp_()[..., None]
            both = torch.lerp(of_self.to(share.dtype), of_prompt.to(share.dtype), share)
            out = torch.cat([out, both.to(q.dtype)])
            lse = torch.cat([lse, joined])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale, ctx.kernel = layout, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        layout, p = ctx.layout, ctx.layout.prompt_tokens
        grad = grads[0].contiguous()

        def part(rows: slice, keys: slice, problem: Ragged) -> tuple[Tensor, Tensor, Tensor]:
            result: tuple[Tensor, Tensor, Tensor] = ctx.kernel.backward(
                grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], problem, ctx.scale
            )
            return result

        prompts, responses = slice(0, p), slice(p, None)
        dq, dk, dv = part(prompts, prompts, layout.within_prompts)
        if layout.has_responses:
            dq_prompt, dk_prompt, dv_prompt = part(responses, prompts, layout.responses_to_prompts)
            dq_self, dk_self, dv_self = part(responses, responses, layout.within_responses)
            dq = torch.cat([dq, dq_prompt + dq_self])
            dk, dv = torch.cat([dk + dk_prompt, dk_self]), torch.cat([dv + dv_prompt, dv_self])
        return dq, dk, dv, None, None, None


class CpuKernel:
    """torch's flash kernel for CPU, one call per sequence; float32, float64, bfloat16."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Ragged, scale: float) -> tuple[Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, keys in _slices(problem):
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(q[rows]),
                _heads_first(k[keys], groups),
                _heads_first(v[keys], groups),
                0.0,
                problem.causal,
                scale=scale,
            )
            out[rows] = part[0].transpose(0, 1)
            lse[rows] = part_lse[0].transpose(0, 1)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Ragged, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in _slices(problem):
            part_q, part_k, part_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(grad[rows]),
                _heads_first(q[rows]),
                _heads_first(k[keys], groups),
                _heads_first(v[keys], groups),
                _heads_first(out[rows]),
                # The kernel reads it as the forward writes it: [1, H, L], heads innermost in memory.
                lse[rows].contiguous().transpose(0, 1)[None],
                0.0,
                problem.causal,
                scale=scale,
            )
            dq[rows] = part_q[0].transpose(0, 1)
            dk[keys] = part_k[0].unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
            dv[keys] = part_v[0].unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
        return dq, dk, dv


class CudaKernel:
    """torch's FlashAttention-2 with ragged lengths; bfloat16 and float16. Written, not run on a GPU yet."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Ragged, scale: float) -> tuple[Tensor, Tensor]:
        offsets_q, offsets_k = problem.offsets(q.device)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, offsets_q, offsets_k, *problem.longest, 0.0, problem.causal, False, scale=scale
        )
        return out, lse.transpose(0, 1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Ragged, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        offsets_q, offsets_k = problem.offsets(q.device)
        # Without dropout the random state is never read, but the operator wants tensors.
        no_rng = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse.transpose(0, 1).contiguous(),
            offsets_q,
            offsets_k,
            *problem.longest,
            0.0,
            problem.causal,
            *no_rng,
            scale=scale,
        )
        return dq, dk, dv


def _heads_first(x: Tensor, repeat: int = 1) -> Tensor:
    """[L, H, D] to [1, H * repeat, L, D]."""
    x = x.transpose(0, 1)
    return (x.repeat_interleave(repeat, 0) if repeat > 1 else x)[None]


def _slices(problem: Ragged) -> list[tuple[slice, slice]]:
    """Rows and keys of each problem that has any."""
    spans = []
    for q_end, q_len, k_end, k_len in zip(
        problem.query_ends, problem.query_lengths, problem.key_ends, problem.key_lengths, strict=True
    ):
        if q_len and k_len:
            spans.append((slice(q_end - q_len, q_end), slice(k_end - k_len, k_end)))
    return spans
