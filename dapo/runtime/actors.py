"""Ray actors: thin wrappers of the policy and the engine, one per device."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from dapo import torchvision_cpu
from dapo.config.run import RunConfig
from dapo.errors import EnvironmentCheckError
from dapo.plan import variables
from dapo.rollout.engine import Begun, Engine
from dapo.train.policy import LogProbs, UpdateResult
from dapo.types import Finished, PackPlan, Prompt, SamplingParams, TrainBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dapo.rollout.broadcast import Broadcast
    from dapo.train.sync import Sent

log = logging.getLogger(__name__)

STREAM_EVERY_S = 0.2


class _Actor:
    """What both kinds share: how they start, and the engine."""

    config: RunConfig
    rank: int
    engine: Engine
    broadcast: Broadcast | None = None
    _make_engine: Callable[[], Engine]

    def rendezvous(self) -> str:
        """host:port where rank 0 will listen for the process group."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def check_start(self) -> None:
        """Raises EnvironmentCheckError where this process was started without what `ray.preload` asks for."""
        if wrong := variables.lacking(self.config.ray.preload):
            raise EnvironmentCheckError(
                f"worker {self.rank} on {socket.gethostname()} was started {'; '.join(wrong)} (ray.preload). Such "
                "variables cannot be set later: export them on that node before `ray start`, or set ray.address=null "
                "for a Ray of our own, which gets them"
            )

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun) -> Iterator[list[Finished]]:
        """What the engine finished since the last call, at most every `STREAM_EVERY_S` seconds."""
        ended: list[Finished] = []
        sent = time.monotonic()
        for done in self.engine.stream(prompts, params, begun):
            ended.append(done)
            if time.monotonic() - sent > STREAM_EVERY_S:
                yield ended
                ended, sent = [], time.monotonic()
        yield ended

    def _join(self, rendezvous: str, member: int, members: int, device: torch.device) -> None:
        """Join a group for weights; the one before it, in which a member may have died, is left first."""
        from dapo.rollout.broadcast import Broadcast

        if self.broadcast is not None:
            self.broadcast.close()
            self.broadcast = None
        self.broadcast = Broadcast(rendezvous, member, members, device)

    def sleep(self) -> int | None:
        return self.engine.sleep()

    def wake(self) -> bool:
        return self.engine.wake()


class Trainer(_Actor):
    """One rank: its shard of the policy and, colocated, its engine."""

    def __init__(self, config: RunConfig, rank: int, world: int) -> None:
        self.config, self.rank, self.world = config, rank, world

    def start(self, rendezvous: str, weights: str) -> dict[str, Any]:
        """Join the process group, load the weights, start the engine where it shares this device."""
        self.check_start()
        torchvision_cpu.install()  # before the imports below bring in transformers
        from dapo.data.processor import PromptProcessor
        from dapo.rollout.factory import make_engine
        from dapo.train.fsdp_policy import FsdpPolicy
        from dapo.train.sync import WeightSync

        host, _, port = rendezvous.rpartition(":")
        os.environ.update(
            MASTER_ADDR=host, MASTER_PORT=port, RANK=str(self.rank), WORLD_SIZE=str(self.world), LOCAL_RANK="0"
        )
        self.processor = PromptProcessor(Path(weights))
        self.policy = FsdpPolicy(self.config, Path(weights), self.processor, rank=self.rank, world=self.world)
        if not self.config.rollout.devices:
            self._make_engine = lambda: make_engine(self.config, Path(weights), self.processor, self.policy.device)
            self.engine = self._make_engine()
        self.weight_sync = WeightSync(self.policy)
        return {"host": socket.gethostname(), "pid": os.getpid(), "device": str(self.policy.device)}

    def restart_engine(self) -> None:
        self.weight_sync.forget()
        dead: Engine | None = vars(self).pop("engine", None)  # absent, where the restart before this one failed
        if dead is not None:
            dead.close()
        self.engine = self._make_engine()

    def logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        return self.policy.logprobs(batch, plan)

    def old_logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        return self.policy.old_logprobs(batch, plan)

    def reference_logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        return self.policy.reference_logprobs(batch, plan)

    def update(self, batch: TrainBatch, plan: PackPlan, index: int) -> UpdateResult:
        return self.policy.update(batch, plan, index)

    def sync(self, version: int) -> dict[str, float]:
        from dapo.rollout.verification import compare_fingerprints

        sent = self.weight_sync.send(lambda weights, unchanged: self.engine.update_weights(weights, version, unchanged))
        compare_fingerprints(trainer=sent.fingerprint, engine=self.engine.fingerprint())
        return sent.metrics

    def join(self, rendezvous: str, members: int) -> None:
        """Rank 0: the group through which engines on devices of their own get their weights."""
        self._join(rendezvous, 0, members, self.policy.device)

    def forget_engines(self) -> None:
        """The engines are new: the next sync sends everything."""
        self.weight_sync.forget()

    def send(self) -> Sent:
        """Weights to the engines on devices of their own; collective."""

        def to_all(weights: Iterator[tuple[str, Tensor]], unchanged: frozenset[str]) -> None:
            assert self.broadcast is not None
            self.broadcast.send(weights, unchanged, self.weight_sync.bucket_bytes)

        return self.weight_sync.send(to_all if self.rank == 0 else None)

    def save(self, folder: str) -> None:
        self.policy.save(Path(folder))

    def load(self, folder: str) -> None:
        self.policy.load(Path(folder))

    def export(self, folder: str) -> None:
        self.policy.export(Path(folder))

    def written(self, wait: bool) -> bool:
        return self.policy.written(wait=wait)


class Generator(_Actor):
    """An engine on a device of its own (`rollout.devices`); no policy, no FSDP.

    Args:
        rank: among the engines' devices.
    """

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.rank = config, rank

    def start(self, rendezvous: str, weights: str) -> dict[str, Any]:
        """Start the engine; ranks of one tensor-parallel group meet at `rendezvous` first."""
        self.check_start()
        torchvision_cpu.install()
        import torch

        from dapo import device as devices
        from dapo.data.processor import PromptProcessor
        from dapo.rollout.factory import make_engine
        from dapo.train.parallel import BACKENDS

        kind = devices.resolve(self.config.device)
        self.device = devices.torch_device(kind)
        tensor_parallel = self.config.rollout.tensor_parallel
        host, _, port = rendezvous.rpartition(":")
        rank = str(self.rank % tensor_parallel)
        os.environ.update(
            MASTER_ADDR=host, MASTER_PORT=port, RANK=rank, WORLD_SIZE=str(tensor_parallel), LOCAL_RANK="0"
        )
        if tensor_parallel > 1:
            torch.distributed.init_process_group(BACKENDS[kind], rank=int(rank), world_size=tensor_parallel)
        processor = PromptProcessor(Path(weights))
        self.engine = make_engine(self.config, Path(weights), processor, self.device)
        return {"host": socket.gethostname(), "pid": os.getpid(), "device": str(self.device)}

    def join(self, rendezvous: str, members: int) -> None:
        """The group through which the trainer's weights come; the trainer's rank 0 is member 0."""
        self._join(rendezvous, 1 + self.rank, members, self.device)

    def receive(self, version: int) -> dict[str, float]:
        """One sync; returns the engine's fingerprint."""
        assert self.broadcast is not None
        self.broadcast.receive(lambda weights, unchanged: self.engine.update_weights(weights, version, unchanged))
        return self.engine.fingerprint()
