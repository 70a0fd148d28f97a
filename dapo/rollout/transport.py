"""Weights into another process: one stream of buckets, for any carrier.

A bucket is some whole tensors side by side in one piece of memory, and a header that says which. Two carriers:
`dapo.rollout.ipc` (another process of this machine) and `dapo.rollout.broadcast` (other devices, other machines).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from dapo.errors import EngineError
from dapo.model.tensors import in_buckets

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Header:
    """What is in a bucket."""

    index: int
    """Its number in this sync, from 0 on."""
    nbytes: int
    names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    """As in torch: `bfloat16`."""
    shapes: tuple[tuple[int, ...], ...] = ()
    failure: str = ""
    """Why the sender breaks off; no bucket follows."""

    @property
    def last(self) -> bool:
        """The end of a sync: a header without a bucket."""
        return not self.names

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        raw = json.loads(data)
        return cls(
            raw["index"],
            raw["nbytes"],
            tuple(raw["names"]),
            tuple(raw["dtypes"]),
            tuple(tuple(shape) for shape in raw["shapes"]),
            raw["failure"],
        )


class Carrier(Protocol):
    """The sending end."""

    def buffer(self, nbytes: int) -> Tensor:
        """Memory for the next bucket, uint8 [nbytes]."""
        ...

    def send(self, header: Header, buffer: Tensor) -> None:
        """Hand a filled buffer over. It is not written to afterwards."""
        ...


def send_weights(weights: Iterable[tuple[str, Tensor]], carrier: Carrier, limit: int) -> None:
    """Pack and send all weights, then the end mark.

    Args:
        weights: in the order of the model, so that modules an engine stores as one are neighbours.
        limit: bytes per bucket (`dapo.train.weights.bucket_bytes`).
    """
    index = 0
    try:
        for bucket in in_buckets(weights, limit, lambda tensor: tensor.nbytes):
            offsets, nbytes = _places(tensor.nbytes for _, tensor in bucket)
            buffer = carrier.buffer(nbytes)
            for start, (_, tensor) in zip(offsets, bucket, strict=True):
                part = buffer[start : start + tensor.nbytes].view(tensor.dtype)
                part.view(tensor.shape).copy_(tensor.detach())
            names, tensors = zip(*bucket, strict=True)
            dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
            header = Header(index, nbytes, names, dtypes, tuple(tuple(tensor.shape) for tensor in tensors))
            # What was gathered may go before the carrier waits for the other end.
            del bucket, tensors
            carrier.send(header, buffer)
            index += 1
    except BaseException as error:
        with contextlib.suppress(Exception):  # the other end may be what failed
            carrier.send(Header(index, 0, failure=f"{type(error).__name__}: {error}"), carrier.buffer(0))
        raise
    carrier.send(Header(index, 0), carrier.buffer(0))


class Unpacker:
    """The receiving end: buckets in order, each of the length its header says, up to the end mark."""

    def __init__(self) -> None:
        self.received = 0

    def check(self, header: Header) -> None:
        """
        Raises:
            EngineError: a bucket was lost or came twice, or the sender broke off.
        """
        if header.failure:
            raise EngineError(f"weight sync: the sender broke off at bucket {header.index}: {header.failure}")
        if header.index != self.received:
            what = f"bucket {header.index} (from {header.names[0]} on)" if header.names else "the end mark"
            raise EngineError(f"weight sync: {what} came when bucket {self.received} was due: a bucket was lost")

    def tensors(self, header: Header, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a bucket, as views of its memory.

        Raises:
            EngineError: see `check`; or the bucket is shorter than its header says.
        """
        self.check(header)
        self.received += 1
        offsets, nbytes = _places(
            torch.Size(shape).numel() * getattr(torch, dtype).itemsize
            for shape, dtype in zip(header.shapes, header.dtypes, strict=True)
        )
        if not nbytes == header.nbytes == buffer.nbytes:
            raise EngineError(
                f"weight sync: bucket {header.index} (from {header.names[0]} on) holds {buffer.nbytes} bytes, its "
                f"tensors have {nbytes}: it was cut off on the way"
            )
        for name, name_of_dtype, shape, start in zip(header.names, header.dtypes, header.shapes, offsets, strict=True):
            dtype = getattr(torch, name_of_dtype)
            yield name, buffer[start : start + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)


def _places(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where each of consecutive tensors begins, and where the last ends."""
    offsets, end = [], 0
    for nbytes in sizes:
        offsets.append(end)
        end += -(-nbytes // _ALIGN) * _ALIGN
    return offsets, end
