"""Whole tensors out of shards, one at a time, and their fingerprint."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dapo.train.parallel import Layout


@torch.no_grad()
def whole_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Each parameter as a whole, cast before it is gathered. Sharded: a collective each, so use it up on all ranks.

    One whole tensor is alive at a time if the caller keeps none of them.
    """
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().to(dtype)
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fingerprint(model: nn.Module, dtype: torch.dtype, layout: Layout) -> dict[str, float]:
    """Float64 sum of absolute values per tensor, from the shards: nothing is gathered."""
    names, sums = [], []
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # Cast like `whole_tensors`, then on CPU, because not every device has float64.
        sums.append(local.to(dtype).to("cpu", torch.float64).abs().sum())
        names.append(name)
    totals = layout.sum(torch.stack(sums)) / layout.shard_copies
    return dict(zip(names, totals.tolist(), strict=True))


def move(network: nn.Module, device: torch.device) -> None:
    """Move a frozen network's weights to a device and back; on CPU nothing happens."""
    if next(network.parameters()).device.type != device.type:
        network.to(device)
