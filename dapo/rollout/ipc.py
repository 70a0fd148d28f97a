"""Weights to an engine in another process of this machine: one copy, no disk.

On CPU and NPU a bucket lies in a file in shared memory, on CUDA in device memory that the other process opens (IPC).
(IPC between NPUs asks for driver 25.3.rc1 and CANN 8.3.rc1, and has not been tried.) Each bucket is memory of its own,
because vLLM reads some tensors only at the end of a sync (an embedding it pads): a reused buffer would hold others.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo.errors import EngineError
from dapo.rollout.transport import Header, Unpacker

SHARED_MEMORY = Path("/dev/shm")
WEIGHTS_FILE = "dapo-weights-"
"""Prefix of shared files with weights; the writer's process id follows, so that leftovers of dead ones are known."""

Deliver = Callable[[bytes, bytes], object]
"""Brings (header, place of the bucket) to the other process and returns when it has loaded the bucket."""


class SharedMemory:
    """`Carrier` through host memory."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._path = ""

    def buffer(self, nbytes: int) -> Tensor:
        """
        Raises:
            EngineError: shared memory is too small.
        """
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        number, self._path = tempfile.mkstemp(dir=folder, prefix=f"{WEIGHTS_FILE}{os.getpid()}-")
        try:
            os.posix_fallocate(number, 0, nbytes)  # without it, a full file system kills the process when written to
        except OSError as error:
            Path(self._path).unlink()
            raise EngineError(
                f"weight sync: no {nbytes / 2**20:.0f} MiB of shared memory in {Path(self._path).parent}: {error}; "
                "enlarge it (docker: --shm-size)"
            ) from error
        finally:
            os.close(number)
        return torch.from_file(self._path, shared=True, size=nbytes, dtype=torch.uint8)

    def send(self, header: Header, buffer: Tensor) -> None:
        if header.last:
            self._deliver(header.to_bytes(), b"")
            return
        try:
            self._deliver(header.to_bytes(), self._path.encode())
        finally:
            Path(self._path).unlink()  # where it is mapped it lives on


class CudaIpc:
    """`Carrier` through memory of one GPU."""

    def __init__(self, device: torch.device, deliver: Deliver) -> None:
        self._device, self._deliver = device, deliver

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def send(self, header: Header, buffer: Tensor) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        if header.last:
            self._deliver(header.to_bytes(), b"")
            return
        torch.cuda.synchronize(self._device)  # the other process does not see this one's stream
        self._deliver(header.to_bytes(), pickle.dumps(reduce_tensor(buffer)))


class Opener:
    """The other process's end of both."""

    def __init__(self) -> None:
        self._unpacker = Unpacker()

    def tensors(self, header: bytes, place: bytes) -> Iterator[tuple[str, Tensor]]:
        """Of one delivery; none for the end mark.

        Raises:
            EngineError: a bucket was lost or cut off, or the sender broke off.
        """
        read = Header.from_bytes(header)
        self._unpacker.check(read)
        if read.last:
            return
        yield from self._unpacker.tensors(read, _open(place, read.nbytes))


def _open(place: bytes, nbytes: int) -> Tensor:
    if not place.startswith(b"/"):  # a pickle of our own parent process
        rebuild, arguments = pickle.loads(place)
        memory: Any = rebuild(*arguments)
        return memory
    path = place.decode()
    size = min(nbytes, os.stat(path).st_size)
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
