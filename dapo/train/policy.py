"""The one interface to training. The controller uses `Policy`; FSDP2, devices and packing to tensors are behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dapo.types import PackPlan, TrainBatch


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Per group, per sequence: one float per response token (nats, after temperature, banned ids left out)."""

    values: tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """One optimiser update, summed over all ranks."""

    metrics: dict[str, float]
    """Names of docs/metrics.md without prefix: loss, grad_norm, entropy, clip_high, clip_low, clip_dual,
    clipped_probability, approx_kl, lr, tokens, skipped, max_ratio_error; router_max_load, router_idle of a MoE."""


class Policy(Protocol):
    """The model being trained, on one device or many."""

    def logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        """Of the current weights, for every sequence; changes nothing."""
        ...

    def old_logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        """Of the weights before the first update of the step; kept by the policy for `update` besides."""
        ...

    def reference_logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        """Of the frozen reference model (only where the configuration asks for KL)."""
        ...

    def update(self, batch: TrainBatch, plan: PackPlan, index: int) -> UpdateResult:
        """Optimiser update `index` of the step: forward, loss, backward over its packs, one AdamW update."""
        ...

    def save(self, folder: Path) -> None:
        """Begin to write the sharded state (weights, optimiser, RNG of every rank) into an existing folder.

        Returns when it is copied to host memory: training may go on. `written` says when the folder is whole.
        """
        ...

    def export(self, folder: Path) -> None:
        """Begin to write a Hugging Face folder that plain transformers loads; as `save`."""
        ...

    def written(self, *, wait: bool) -> bool:
        """Whether everything begun with `save` and `export` is on disk and checked.

        Raises:
            CheckpointError: it could not be written; the folders are of no use.
        """
        ...

    def load(self, folder: Path) -> None: ...


class SyncedPolicy(Policy, Protocol):
    """A policy whose weights the engines follow: the controller's. `FsdpPolicy`, one rank of it, knows no engine."""

    def sync(self, version: int) -> dict[str, float]:
        """Give the weights to the engines and prove that they arrived; returns seconds and GB/s.

        Raises:
            EngineError: a tensor did not arrive, or an engine refused it or is gone.
        """
        ...
