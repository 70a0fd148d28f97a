"""What trainer and engines must agree on about weight tensors: fused modules and checksums."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""The module in which engines store a projection together with others."""
SMALLEST_BUCKET = 2**26
"""Bytes moved at once; below it, waiting for an exchange takes longer than moving what is in it."""
_EXPERTS = re.compile(r"^(.+\.experts)\.")
_CHUNK = 2**16

T = TypeVar("T")


def fused_group(name: str) -> str:
    """The module in which an engine stores this tensor: tensors of one module must come together.

    q, k, v are one module there, gate and up as well, and so are all experts of a layer. A tensor that comes without
    the others of its module leaves them uninitialised.
    """
    if experts := _EXPERTS.match(name):
        return experts[1]
    module = name.rpartition(".")[0]
    parent, _, last = module.rpartition(".")
    return f"{parent}.{FUSED[last]}" if last in FUSED else module


def in_buckets(
    weights: Iterable[tuple[str, T]], limit: int, nbytes: Callable[[T], int]
) -> Iterator[list[tuple[str, T]]]:
    """Consecutive tensors of at most `limit` bytes together; a module's tensors stay together, in a bucket of their own
    where they are larger than that."""
    bucket: list[tuple[str, T]] = []
    size = 0
    for _, members in groupby(weights, key=lambda item: fused_group(item[0])):
        group = list(members)
        bytes_ = sum(nbytes(tensor) for _, tensor in group)
        if bucket and size + bytes_ > limit:
            yield bucket
            bucket, size = [], 0
        bucket += group
        size += bytes_
    if bucket:
        yield bucket


@torch.no_grad()
def absolute_sum(tensor: Tensor) -> float:
    """Sum of absolute values, to float64's precision; NaN if there is one.

    In chunks that stay in the processor's cache: 9 times as fast as a norm in float64. Accelerators add up short rows
    in float32, because not every device has float64; the relative error is below 1e-6.
    """
    flat: Any = tensor.detach().reshape(-1)
    if flat.device.type == "cpu":
        return float(sum(chunk.abs().to(torch.float64).sum() for chunk in flat.split(_CHUNK)))
    rows = len(flat) // 1024
    sums = flat[: rows * 1024].view(rows, 1024).abs().sum(1, dtype=torch.float32).cpu().double().sum()
    return float(sums + flat[rows * 1024 :].cpu().double().abs().sum())


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bits: detects any change, where two sums could be equal by chance."""
    bits: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(bits)
