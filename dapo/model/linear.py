"""Matrix products as fast as the device allows: on CPU through oneDNN, whose vector units torch's default leaves idle.

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


class PatchProjection(nn.Conv3d):
    """A convolution whose stride is its kernel, as the matrix product that it is; the same parameters.

    As a convolution in bfloat16 it is many times slower on some GPUs (pytorch#174051) and NPUs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[patches, channels, time, height, width] of whole patches to [patches, features]."""
        rows, weight = input.flatten(1), self.weight.flatten(1)
        if not uses_onednn(rows):
            return functional.linear(rows, weight, self.bias)
        out: Tensor = _Linear.apply(rows, weight, self.bias)
        return out


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


def route_products(model: nn.Module, device: torch.device) -> None:
    """Replace patch projections by `PatchProjection` and, on CPU, linear layers by `OneDnnLinear`.

    Parameters, names and state_dict stay the same.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            routed: nn.Linear | nn.Conv3d
            if type(child) is nn.Conv3d and child.kernel_size == child.stride:
                time, height, width = child.kernel_size
                shape = child.in_channels, child.out_channels, (time, height, width)
                routed = PatchProjection(*shape, bias=child.bias is not None, device="meta")
            elif type(child) is nn.Linear and device.type == "cpu":
                routed = OneDnnLinear(child.in_features, child.out_features, child.bias is not None, device="meta")
            else:
                continue
            routed.weight, routed.bias = child.weight, child.bias
            setattr(parent, name, routed)
