"""The controller's two clients of the workers: `RayEngine` and `RayPolicy`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import ray

from dapo.errors import DapoError, EngineError
from dapo.rollout.engine import Begun, collected
from dapo.rollout.verification import compare_fingerprints
from dapo.runtime.workers import WRITE, Workers
from dapo.train.policy import LogProbs, UpdateResult
from dapo.types import Completion, Finished, PackPlan, Prompt, SamplingParams, TrainBatch


class RayEngine:
    """`Engine` over all workers: each generates for its share of the prompts."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        return collected(self.stream(prompts, params), len(prompts), params.n)

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun = ()) -> Iterator[Finished]:
        """See `Engine.stream`: of all replicas, in the order in which they send."""
        tp = self.workers.config.rollout.tensor_parallel
        engines, kind = self.workers.engines, "generator" if self.workers.generators else "trainer"
        replicas = len(engines) // tp
        deadline = self.workers.engine_deadline
        ends_at = time.monotonic() + deadline.seconds
        open_streams: dict[Any, int] = {}
        for i, actor in enumerate(engines):
            replica = i // tp
            share = prompts[replica::replicas], params, begun[replica::replicas]
            open_streams[actor.stream.options(num_returns="streaming").remote(*share)] = i
        failure: DapoError | None = None
        while open_streams:
            ready, _ = ray.wait(list(open_streams), timeout=max(0.0, ends_at - time.monotonic()))
            if not ready:
                late = [f"{kind}-{i}" for i in open_streams.values()]
                raise failure or self.workers.hang(late, deadline, "generation", engines=True)
            replica, rank = divmod(open_streams[ready[0]], tp)
            try:
                part = self.workers.get([next(cast(Iterator[Any], ready[0]))], None, "generation", engines=True)[0]
            except StopIteration:
                del open_streams[ready[0]]
                continue
            except EngineError as error:
                # What the others write is kept; and they could not be restarted while they write.
                failure = error
                del open_streams[ready[0]]
                continue
            # Ranks of one tensor-parallel group write the same; the first one is heard.
            for done in part if rank == 0 else ():
                yield done._replace(prompt=replica + replicas * done.prompt)
        if failure is not None:
            raise failure

    def restart(self) -> None:
        self.workers.restart_engines()

    def sleep(self) -> int | None:
        """Colocated engines make room for the trainer; others have their device for themselves.

        Returns:
            bytes freed on the device where it was least; None where none slept.
        """
        if self.workers.generators:
            return None
        freed = self.workers.call("sleep", deadline=self.workers.engine_deadline)
        return min((each for each in freed if each is not None), default=None)

    def wake(self) -> bool:
        """Whether a colocated engine slept."""
        workers = self.workers
        return not workers.generators and any(workers.call("wake", deadline=workers.engine_deadline))


class RayPolicy:
    """`SyncedPolicy` over all workers. A batch travels once per step, by reference."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self._sent: tuple[TrainBatch, PackPlan, Any, Any] | None = None

    def logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        return _merged(self.workers.call("logprobs", batch, plan))

    def old_logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        return _merged(self.workers.call("old_logprobs", *self._refs(batch, plan)))

    def reference_logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        return _merged(self.workers.call("reference_logprobs", *self._refs(batch, plan)))

    def update(self, batch: TrainBatch, plan: PackPlan, index: int) -> UpdateResult:
        result: UpdateResult = self.workers.call("update", *self._refs(batch, plan), index)[0]
        return result

    def sync(self, version: int) -> dict[str, float]:
        workers = self.workers
        if not workers.generators:
            metrics: dict[str, float] = workers.call("sync", version, deadline=workers.engine_deadline)[0]
            return metrics
        sending = [trainer.send.remote() for trainer in workers.trainers]
        receiving = [generator.receive.remote(version) for generator in workers.generators]
        # All wait for each other: the restart that follows shows which one hangs.
        sent, *others = workers.get([*sending, *receiving], workers.engine_deadline, "weight sync", engines=True)
        for fingerprint in others[len(sending) - 1 :]:
            compare_fingerprints(trainer=sent.fingerprint, engine=fingerprint)
        return dict(sent.metrics)

    def save(self, folder: Path) -> None:
        self.workers.call("save", str(folder))

    def load(self, folder: Path) -> None:
        self.workers.call("load", str(folder))

    def export(self, folder: Path) -> None:
        self.workers.call("export", str(folder))

    def written(self, *, wait: bool) -> bool:
        return all(self.workers.call("written", wait, deadline=WRITE))

    def _refs(self, batch: TrainBatch, plan: PackPlan) -> tuple[Any, Any]:
        if self._sent is None or self._sent[0] is not batch or self._sent[1] is not plan:
            self._sent = (batch, plan, ray.put(batch), ray.put(plan))
        return self._sent[2], self._sent[3]


def _merged(parts: list[LogProbs]) -> LogProbs:
    """Each worker knows its own packs' sequences and leaves the others empty."""
    groups = zip(*(p.values for p in parts), strict=True)
    return LogProbs(tuple(tuple(next((v for v in seq if v), ()) for seq in zip(*g, strict=True)) for g in groups))
