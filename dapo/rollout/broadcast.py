"""Weights to engines on other devices: broadcast over a process group of their own.

Engines that do not share the trainer's process (disaggregated placement, one-step-off-policy overlap) join a group with
the trainer's rank 0. The controller arranges it like this:

1. Trainer rank 0 chooses `rendezvous` ("host:port", free). With E engine processes the group has 1 + E members:
   the trainer's rank 0 is member 0, the engines are 1 to E. All call `Broadcast(rendezvous, member, 1 + E, device)` at
   the same time (it waits for the others) and keep it. Only the engine's process is needed: no policy, no FSDP.
2. For each sync, at the same time on all of them:

   - trainer, every rank: `sent = WeightSync(policy).send(take)` (`dapo.train.sync`; one object for all syncs), where
     `take` on rank 0 is `lambda weights, unchanged: broadcast.send(weights, unchanged, weight_sync.bucket_bytes)`, and
     None on the others, which only take part in gathering.
   - engine, every process: `broadcast.receive(lambda weights, unchanged: engine.update_weights(weights, version,
     unchanged))`. `weights` is an iterator; one bucket of it is in memory at a time.

3. `compare_fingerprints(trainer=sent.fingerprint, engine=<each engine's fingerprint()>)`.

If an engine process dies, the group is broken: `close()` what is left of it, make a new group on a new port, and call
`WeightSync.forget()`, so that the new engine gets everything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapo import device as devices
from dapo.errors import EngineError
from dapo.rollout.transport import Header, Unpacker, send_weights

Take = Callable[[Iterator[tuple[str, Tensor]], frozenset[str]], object]


class Broadcast:
    """One member of the group: member 0 sends, the others receive. gloo on CPU, NCCL and HCCL on their devices.

    Args:
        rendezvous: host:port where member 0 listens.
        device: where buckets are held; the same kind on all members.
        deadline_s: how long to wait for the others, at the start and in each exchange.

    Raises:
        EngineError: not all members came within the deadline.
    """

    def __init__(
        self, rendezvous: str, member: int, members: int, device: torch.device | str = "cpu", deadline_s: float = 300.0
    ) -> None:
        self.device, self.member = torch.device(device), member
        self._ended, self._broken, self._deadline_s = True, False, deadline_s
        host, _, port = rendezvous.rpartition(":")
        timeout = timedelta(seconds=deadline_s)
        try:
            store = dist.TCPStore(host, int(port), members, is_master=member == 0, timeout=timeout)
            spare = timedelta(seconds=0 if self.device.type == "cpu" else _LIBRARY_S)
            self._group = devices.process_group(self.device, store, member, members, timeout + spare)
        except RuntimeError as error:
            raise EngineError(
                f"weight sync: member {member} of {members} did not reach all others at {rendezvous} within "
                f"{deadline_s:.0f} s: {error}"
            ) from error
        self._store = store  # the group's connections live in it

    def send(self, weights: Iterable[tuple[str, Tensor]], unchanged: Collection[str], limit: int) -> None:
        """Member 0: all of `weights` to every other member.

        Args:
            unchanged: names that the engines keep.
            limit: bytes per bucket.

        Raises:
            EngineError: a member is gone or does not receive.
        """
        self._exchange_bytes(json.dumps(sorted(unchanged)).encode())
        send_weights(weights, _Carrier(self), limit)

    def receive(self, take: Take) -> None:
        """Other members: let an engine take what `send` gets.

        If the engine stops half way, the rest is received and dropped, so that the others are not kept waiting and the
        group stays usable.

        Args:
            take: the engine's `update_weights`, given the weights in the sender's order and the names that are kept.

        Raises:
            EngineError: the sender broke off or is gone, a bucket was lost on the way, or the engine's own.
        """
        unchanged = frozenset(json.loads(self._exchange_bytes(None)))
        self._ended = False  # here: an engine that refuses at once never starts the iterator
        weights = self._weights()
        try:
            take(weights, unchanged)
        except BaseException:
            self._drop_rest()
            raise
        for _ in weights:  # the end mark, at least
            pass

    def close(self) -> None:
        """Leave the group; what another thread still waits for in it fails."""
        devices.abort_process_group(self.device, self._group)
        del self._group, self._store

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        unpacker = Unpacker()
        while header := self._next_header():
            unpacker.check(header)
            if header.last:
                return
            yield from unpacker.tensors(header, self._next_bucket(header))

    def _next_header(self) -> Header:
        header = Header.from_bytes(self._exchange_bytes(None))
        self._ended = header.last
        return header

    def _next_bucket(self, header: Header) -> Tensor:
        buffer = torch.empty(header.nbytes, dtype=torch.uint8, device=self.device)
        self._exchange(buffer)
        return buffer

    def _drop_rest(self) -> None:
        while not self._ended and not self._broken:
            header = self._next_header()
            if not header.last:
                self._next_bucket(header)

    def _exchange_bytes(self, data: bytes | None) -> bytes:
        """A short message from member 0 to all."""
        length = torch.tensor([len(data or b"")], device=self.device)
        self._exchange(length)
        if data is None:
            content = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        else:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        self._exchange(content)
        return content.cpu().numpy().tobytes()

    def _wait_for_device(self, work: Any) -> None:
        """Until a collective ended on the device. `wait` would only enqueue it there and return; a dead peer would then
        block the next copy to the host until the library's watchdog ends this process."""
        until = time.monotonic() + self._deadline_s
        while not work.is_completed():
            if time.monotonic() > until:
                devices.abort_process_group(self.device, self._group)
                raise RuntimeError(f"no answer within {self._deadline_s:.0f} s")
            time.sleep(_POLL_S)

    def _exchange(self, tensor: Tensor) -> None:
        try:
            work = self._group.broadcast([tensor], _FROM_MEMBER_0)
            if self.device.type != "cpu":
                self._wait_for_device(work)
            work.wait()
        except RuntimeError as error:
            self._broken = True
            lost = "the trainer" if self.member else "an engine"
            raise EngineError(
                f"weight sync: member {self.member} lost {lost} during a broadcast: {error}; make a new group"
            ) from error


class _Carrier:
    def __init__(self, broadcast: Broadcast) -> None:
        self._to = broadcast

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._to.device)

    def send(self, header: Header, buffer: Tensor) -> None:
        self._to._exchange_bytes(header.to_bytes())
        if not header.last:
            self._to._exchange(buffer)


_POLL_S = 0.0005
_LIBRARY_S = 60.0
"""The device library's own deadline is this much longer than ours: its watchdog ends the process."""
_FROM_MEMBER_0 = dist.BroadcastOptions()  # root rank and root tensor are 0
