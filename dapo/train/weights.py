"""Whole tensors out of shards, one at a time, and their fingerprint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dapo.model.tensors import SMALLEST_BUCKET, absolute_sum, checksum, fused_group, in_buckets
from dapo.train.parallel import RankMesh


def bucket_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes moved in one exchange: as much as the largest module that engines store as one (a layer's experts)."""
    groups: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        groups[fused_group(name)] += parameter.numel() * dtype.itemsize
    return max(SMALLEST_BUCKET, *groups.values())


@torch.no_grad()
def whole_tensors(
    model: nn.Module, dtype: torch.dtype, names: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter as a whole, in the order of the model, cast before it is gathered.

    Sharded: a collective per bucket, so use it up on all ranks. One bucket is alive at a time if the caller keeps none.

    Args:
        names: only these.
    """
    wanted = [
        (name, parameter.detach()) for name, parameter in model.named_parameters() if names is None or name in names
    ]
    limit = bucket_bytes(model, dtype)
    for bucket in in_buckets(wanted, limit, lambda tensor: tensor.numel() * dtype.itemsize):
        sharded = [(name, tensor) for name, tensor in bucket if isinstance(tensor, DTensor)]
        gathered = dict(_gather(sharded, dtype)) if sharded else {}
        for name, tensor in bucket:
            yield name, gathered.pop(name) if name in gathered else tensor.to(dtype)


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
def fingerprint(model: nn.Module, dtype: torch.dtype, ranks: RankMesh) -> dict[str, float]:
    """Float64 sum of absolute values per tensor, from the shards: nothing is gathered."""
    sums = {name: absolute_sum(local.to(dtype)) for name, local in _locals(model)}
    totals = ranks.sum(torch.tensor(list(sums.values()), dtype=torch.float64)) / ranks.shard_copies
    return dict(zip(sums, totals.tolist(), strict=True))


def checksums(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Per tensor: of the bits of this rank's shard, as an engine would get them."""
    return {name: checksum(local.to(dtype)) for name, local in _locals(model)}


def shard_checksums(model: nn.Module, dtype: torch.dtype, ranks: RankMesh) -> dict[str, tuple[int, ...]]:
    """`checksums` of all ranks that hold one copy between them, in the order of their rows; collective."""
    own = checksums(model, dtype)
    gathered = ranks.gather(torch.tensor(list(own.values()), dtype=torch.float64))  # holds 32 bits exactly
    shards = gathered[: ranks.world // ranks.shard_copies].long()
    return {name: tuple(column) for name, column in zip(own, shards.T.tolist(), strict=True)}


def _locals(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.to_local() if isinstance(tensor, DTensor) else tensor


def move(network: nn.Module, device: torch.device) -> None:
    """Move a frozen network's weights to a device and back; on CPU nothing happens."""
    if next(network.parameters()).device.type != device.type:
        network.to(device)
