"""From the trainer's shards to an engine: only what changed since the last sync, with timings and fingerprints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dapo import device as devices
from dapo.model.tensors import fused_group
from dapo.train import weights
from dapo.train.fsdp_policy import FsdpPolicy

Take = Callable[[Iterator[tuple[str, Tensor]], frozenset[str]], object]
"""Uses up the weights; the second argument names the tensors that the engine keeps."""


@dataclass(frozen=True)
class Sent:
    """One sync, as the trainer saw it."""

    fingerprint: dict[str, float]
    """Of all tensors, sent or kept, for `compare_fingerprints`."""
    nbytes: int
    seconds: float
    """From the first gathered bucket until the engine had the last."""

    @property
    def metrics(self) -> dict[str, float]:
        gigabytes = self.nbytes / 1e9
        return {
            "time/sync_copy": self.seconds,
            "engine/sync_gb": gigabytes,
            "engine/sync_gb_per_s": gigabytes / max(self.seconds, 1e-9),
        }


class WeightSync:
    """State of this rank's engines, and the sync that updates them. All ranks make the same calls."""

    def __init__(self, policy: FsdpPolicy) -> None:
        self.policy = policy
        self._held: dict[str, int] = {}

    @property
    def bucket_bytes(self) -> int:
        return weights.bucket_bytes(self.policy.model, self.policy.compute_dtype)

    def forget(self) -> None:
        """The engine was started again or is not trusted: the next sync sends everything."""
        self._held = {}

    def send(self, take: Take | None) -> Sent:
        """Give the engine what changed since it last took something; collective.

        A module whose tensors an engine stores as one is sent whole if any of them changed. If this fails anywhere, the
        next sync sends everything.

        Args:
            take: the engine's `update_weights`, or a transport's `send`; None on ranks that only help to gather.
        """
        policy = self.policy
        now = weights.checksums(policy.model, policy.compute_dtype)
        changed = self._changed(now)
        # Collectives first: where only this rank's engine fails, the others must not be left waiting in one.
        fingerprint = policy.fingerprint()
        self._held = {}
        stream = policy.named_weights(changed)
        started = time.perf_counter()
        try:
            if take is not None:
                take(stream, frozenset(now) - changed)
        finally:
            for _ in stream:  # the other ranks gather together with this one, whatever happened to its engine
                pass
        devices.synchronize(policy.device)
        seconds = time.perf_counter() - started
        self._held = now
        sizes = {name: p.numel() * policy.compute_dtype.itemsize for name, p in policy.model.named_parameters()}
        return Sent(fingerprint, sum(sizes[name] for name in changed), seconds)

    def _changed(self, now: dict[str, int]) -> frozenset[str]:
        """Names to send: a rank sees its own shards, and all must come to the same answer."""
        own = torch.tensor([float(self._held.get(name) != value) for name, value in now.items()])
        anywhere = self.policy.ranks.sum(own) > 0
        groups = {fused_group(name) for name, yes in zip(now, anywhere.tolist(), strict=True) if yes}
        return frozenset(name for name in now if fused_group(name) in groups)
