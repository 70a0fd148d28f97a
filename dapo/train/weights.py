"""Whole tensors out of shards, one at a time, and their fingerprint."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dapo.train.parallel import Layout

BUCKET_BYTES = 2**28
"""Whole tensors gathered in one exchange: many small ones, or one that is larger than this."""


@torch.no_grad()
def whole_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Each parameter as a whole, in the order of the model, cast before it is gathered.

    Sharded: a collective per bucket, so use it up on all ranks. One bucket is alive at a time if the caller keeps none.
    """
    bucket: list[tuple[str, DTensor]] = []
    size = 0
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if not isinstance(tensor, DTensor):
            yield name, tensor.to(dtype)
            continue
        if bucket and size + tensor.numel() * dtype.itemsize > BUCKET_BYTES:
            yield from _gather(bucket, dtype)
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.numel() * dtype.itemsize
    if bucket:
        yield from _gather(bucket, dtype)


def _gather(bucket: list[tuple[str, DTensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket as wholes: every rank's rows side by side, in one exchange."""
    mesh = bucket[0][1].device_mesh
    axis = mesh.ndim - 1  # the last axis shards, one before it copies
    ranks = mesh.size(axis)
    rows = [-(-tensor.shape[0] // ranks) for _, tensor in bucket]
    widths = [n * (t.numel() // t.shape[0]) for n, (_, t) in zip(rows, bucket, strict=True)]
    own = torch.zeros(sum(widths), dtype=dtype, device=mesh.device_type)  # shards may live in host memory
    for part, (_, tensor) in zip(own.split(widths), bucket, strict=True):
        local = tensor.to_local().to(dtype).flatten()
        part[: local.numel()] = local  # the last ranks may have fewer rows, or none
    gathered = torch.empty(ranks * len(own), dtype=dtype, device=own.device)
    dist.all_gather_into_tensor(gathered, own, group=mesh.get_group(axis))
    for part, (name, tensor) in zip(gathered.view(ranks, -1).split(widths, dim=1), bucket, strict=True):
        yield name, part.reshape(-1)[: tensor.numel()].view(tensor.shape)


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
