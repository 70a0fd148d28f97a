"""Ray actors: thin shells round the policy and the engine, one per device, and the two fan-out doors to them."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from dapo import torchvision_cpu
from dapo.config.run import RunConfig
from dapo.errors import DapoError, EngineError, EnvironmentCheckError, TrainingError
from dapo.plan import variables
from dapo.rollout.engine import Begun, collected
from dapo.train.policy import LogProbs, UpdateResult
from dapo.types import Completion, Finished, PackPlan, Prompt, SamplingParams, TrainBatch

log = logging.getLogger(__name__)

START_DEADLINE_S = 600.0
WRITE_DEADLINE_S = 1800.0
STREAM_EVERY_S = 0.2


class Worker:
    """One rank: its shard of the policy and (colocated) its engine."""

    def __init__(self, config: RunConfig, rank: int, world: int) -> None:
        self.config, self.rank, self.world = config, rank, world

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

    def start(self, rendezvous: str, weights: str) -> dict[str, Any]:
        """Join the process group, load the weights, start the engine."""
        self.check_start()
        torchvision_cpu.install()  # before the imports below bring in transformers
        from dapo.data.processor import PromptProcessor
        from dapo.rollout.choice import make_engine
        from dapo.train.fsdp_policy import FsdpPolicy
        from dapo.train.sync import WeightSync

        host, _, port = rendezvous.rpartition(":")
        os.environ.update(
            MASTER_ADDR=host, MASTER_PORT=port, RANK=str(self.rank), WORLD_SIZE=str(self.world), LOCAL_RANK="0"
        )
        self.processor = PromptProcessor(Path(weights))
        self.policy = FsdpPolicy(self.config, Path(weights), self.processor, rank=self.rank, world=self.world)
        self._make_engine = lambda: make_engine(self.config, Path(weights), self.processor, self.policy.device)
        self.engine = self._make_engine()
        self.weight_sync = WeightSync(self.policy)
        return {"host": socket.gethostname(), "pid": os.getpid(), "device": str(self.policy.device)}

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun) -> Iterator[list[Finished]]:
        """What the engine wrote since the last time it was looked, at most every `STREAM_EVERY_S` seconds."""
        ended: list[Finished] = []
        sent = time.monotonic()
        for done in self.engine.stream(prompts, params, begun):
            ended.append(done)
            if time.monotonic() - sent > STREAM_EVERY_S:
                yield ended
                ended, sent = [], time.monotonic()
        yield ended

    def restart_engine(self) -> None:
        self.weight_sync.forget()
        self.engine.close()
        self.engine = self._make_engine()

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        return self.policy.logprobs(batch, plan)

    def old_logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        return self.policy.old_logprobs(batch, plan)

    def reference_logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        return self.policy.reference_logprobs(batch, plan)

    def update(self, batch: TrainBatch, plan: PackPlan, index: int) -> UpdateResult:
        return self.policy.update(batch, plan, index)

    def sync(self, version: int) -> dict[str, float]:
        from dapo.rollout.checks import compare_fingerprints

        sent = self.weight_sync.send(lambda weights, unchanged: self.engine.update_weights(weights, version, unchanged))
        try:
            compare_fingerprints(trainer=sent.fingerprint, engine=self.engine.fingerprint())
        except EngineError:
            self.weight_sync.forget()
            raise
        return sent.metrics

    def save(self, folder: str) -> None:
        self.policy.save(Path(folder))

    def load(self, folder: str) -> None:
        self.policy.load(Path(folder))

    def export(self, folder: str) -> None:
        self.policy.export(Path(folder))

    def written(self, wait: bool) -> bool:
        return self.policy.written(wait=wait)


def start_workers(config: RunConfig, threads: int) -> list[Any]:
    """One actor per device; says what is missing instead of waiting for it for ever."""
    from dapo import device

    world = config.model.parallel.world_size
    kind = device.resolve(config.device)
    have = ray.cluster_resources()
    options: dict[str, Any] = {"num_cpus": 0}
    if kind != "cpu":
        name = "GPU" if kind == "cuda" else "NPU"
        if have.get(name, 0) < world:
            raise EnvironmentCheckError(
                f"model.parallel.world_size={world} needs {world} {name} devices, the Ray cluster has "
                f"{int(have.get(name, 0))}; lower it, or join nodes with `ray start` (for NPUs Ray cannot count: "
                f"--resources='{{\"NPU\": 16}}')"
            )
        options = {"num_gpus": 1} if kind == "cuda" else {"resources": {"NPU": 1}}
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"} if kind == "cpu" else {}
    actor = ray.remote(Worker)
    return [
        actor.options(**options, name=f"worker-{rank}", runtime_env={"env_vars": env}).remote(config, rank, world)
        for rank in range(world)
    ]


class Workers:
    """Calls every worker and turns what goes wrong into one sentence."""

    def __init__(self, config: RunConfig, threads: int) -> None:
        self.actors = start_workers(config, threads)
        self.config = config

    def begin(self, weights: Path) -> list[Any]:
        """Start loading everywhere; returns at once with what `get` waits for."""
        rendezvous = self.get([self.actors[0].rendezvous.remote()], START_DEADLINE_S, "starting")[0]
        return [actor.start.remote(rendezvous, str(weights)) for actor in self.actors]

    def call(self, method: str, *args: Any, deadline_s: float | None = None) -> list[Any]:
        """The same call on every worker (collectives inside need all of them)."""
        return self.get([getattr(a, method).remote(*args) for a in self.actors], deadline_s, method)

    def get(self, refs: list[Any], deadline_s: float | None, what: str) -> list[Any]:
        try:
            return list(ray.get(refs, timeout=deadline_s))
        except GetTimeoutError:
            raise EngineError(f"{what} did not end within {deadline_s:.0f} s on every worker: it hangs") from None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, DapoError):
                raise cause from error
            raise
        except RayActorError as error:
            raise TrainingError(f"a worker process died during {what}: {error}") from error

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


class RayEngine:
    """`Engine` over all workers: each generates for its share of the prompts."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.deadline_s = workers.config.rollout.deadline_s

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        return collected(self.stream(prompts, params), len(prompts), params.n)

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun = ()) -> Iterator[Finished]:
        """See `Engine.stream`: of all replicas, in the order in which they send."""
        tp = self.workers.config.rollout.tensor_parallel
        replicas = len(self.workers.actors) // tp
        ends_at = time.monotonic() + self.deadline_s
        open_streams: dict[Any, int] = {}
        followers = []
        for i, actor in enumerate(self.workers.actors):
            replica = i // tp
            share = prompts[replica::replicas], params, begun[replica::replicas]
            stream = actor.stream.options(num_returns="streaming").remote(*share)
            if i % tp:
                followers.append(stream)  # ranks of one tensor-parallel group write the same; the first one is heard
            else:
                open_streams[stream] = replica
        while open_streams:
            ready, _ = ray.wait(list(open_streams), timeout=max(0.0, ends_at - time.monotonic()))
            if not ready:
                raise EngineError(f"generation did not end within {self.deadline_s:.0f} s on every worker: it hangs")
            replica = open_streams[ready[0]]
            try:
                part = next(cast(Iterator[Any], ready[0]))
            except StopIteration:
                del open_streams[ready[0]]
                continue
            for done in self.workers.get([part], self.deadline_s, "generation")[0]:
                yield done._replace(prompt=replica + replicas * done.prompt)

    def restart(self) -> None:
        self.workers.call("restart_engine", deadline_s=START_DEADLINE_S)

    def sleep(self) -> None:
        self.workers.call("sleep")

    def wake(self) -> None:
        self.workers.call("wake")


class RayPolicy:
    """`Policy` over all workers. A batch travels once per step, by reference."""

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
        metrics: dict[str, float] = self.workers.call("sync", version)[0]
        return metrics

    def save(self, folder: Path) -> None:
        self.workers.call("save", str(folder))

    def load(self, folder: Path) -> None:
        self.workers.call("load", str(folder))

    def export(self, folder: Path) -> None:
        self.workers.call("export", str(folder))

    def written(self, *, wait: bool) -> bool:
        return all(self.workers.call("written", wait, deadline_s=WRITE_DEADLINE_S))

    def _refs(self, batch: TrainBatch, plan: PackPlan) -> tuple[Any, Any]:
        if self._sent is None or self._sent[0] is not batch or self._sent[1] is not plan:
            self._sent = (batch, plan, ray.put(batch), ray.put(plan))
        return self._sent[2], self._sent[3]


def _merged(parts: list[LogProbs]) -> LogProbs:
    """Each worker knows its own packs' sequences and leaves the others empty."""
    groups = zip(*(p.values for p in parts), strict=True)
    return LogProbs(tuple(tuple(next((v for v in seq if v), ()) for seq in zip(*g, strict=True)) for g in groups))
