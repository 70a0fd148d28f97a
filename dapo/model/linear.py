"""Matrix products on CPU through oneDNN, which uses the vector units that torch's default library leaves idle.

`torch.set_float32_matmul_precision("medium")` would do the same for everything, but slows the flash attention kernel,
and on CPUs with AMX it would round to bfloat16. Only linear layers are routed here, and they stay true float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = 64
"""oneDNN compiles a kernel for every number of rows it meets, about a millisecond each: row counts are rounded up."""


def rounded_rows(rows: int, like: Tensor) -> int:
    """The number of rows to compute instead of `rows`, for products with this tensor."""
    return -(-rows // ROWS) * ROWS if uses_onednn(like) else rows


def uses_onednn(x: Tensor) -> bool:
    """Whether this tensor's products go through oneDNN."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for matrices [N, K] and [M, K]; not differentiable."""
    if uses_onednn(a) and a.numel() and b.numel():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return out
    return a @ b.T


class OneDnnLinear(nn.Linear):
    """`nn.Linear` with the same parameters; float32 on CPU goes through oneDNN, all else as usual."""

    def forward(self, input: Tensor) -> Tensor:
        if not uses_onednn(input) or not input.numel():
            return functional.linear(input, self.weight, self.bias)
        out: Tensor = _Linear.apply(input.reshape(-1, input.shape[-1]), self.weight, self.bias)
        return out.view(*input.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        dx = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        dw = product(grad.T, x.T) if ctx.needs_input_grad[1] else None
        db = grad.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dw, db


def route_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of a model by `OneDnnLinear`; parameters, names and state_dict stay the same."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                routed = OneDnnLinear(child.in_features, child.out_features, child.bias is not None, device="meta")
                routed.weight, routed.bias = child.weight, child.bias
                setattr(parent, name, routed)
