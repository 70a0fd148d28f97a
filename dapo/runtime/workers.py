"""The fan-out over all actors, and the two doors of the controller to them: `RayEngine` and `RayPolicy`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from dapo import device
from dapo.config.run import RunConfig
from dapo.errors import DapoError, EngineError, EnvironmentCheckError, TrainingError
from dapo.rollout.checks import compare_fingerprints
from dapo.rollout.engine import Begun, collected
from dapo.runtime.actors import Generator, Trainer
from dapo.train.policy import LogProbs, UpdateResult
from dapo.types import Completion, Finished, PackPlan, Prompt, SamplingParams, TrainBatch

START_DEADLINE_S = 600.0
WRITE_DEADLINE_S = 1800.0


class Workers:
    """One actor per device: the trainers and, with `rollout.devices`, engines beside them. Calls them, and turns what
    goes wrong into one sentence.

    Raises:
        EnvironmentCheckError: the cluster has fewer devices than the run needs.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._options = _actor_options(config)
        world = config.model.parallel.world_size
        self.trainers = [self._actor(Trainer, f"trainer-{i}").remote(config, i, world) for i in range(world)]
        self.generators = self._new_generators()

    @property
    def engines(self) -> list[Any]:
        """The actors that hold an engine."""
        return self.generators or self.trainers

    def begin(self, weights: Path) -> list[Any]:
        """Start loading everywhere; returns at once with what `ready` waits for."""
        self.weights = str(weights)
        rendezvous = self._rendezvous(self.trainers[0])
        return [a.start.remote(rendezvous, self.weights) for a in self.trainers] + self._begin_generators()

    def ready(self, loading: list[Any]) -> list[Any]:
        """Wait for what `begin` began; returns host, process and device of each actor."""
        places = self.get(loading, START_DEADLINE_S, "loading the weights")
        self._join()
        return places

    def restart_engines(self) -> None:
        """Engines on devices of their own get new processes, whatever became of the old ones."""
        if not self.generators:
            self.call("restart_engine", deadline_s=START_DEADLINE_S)
            return
        for actor in self.generators:
            ray.kill(actor)
        self.generators = self._new_generators()
        self.get(self._begin_generators(), START_DEADLINE_S, "restarting the engines")
        self._join()
        self.call("forget_engines")

    def call(self, method: str, *args: Any, deadline_s: float | None = None) -> list[Any]:
        """The same call on every trainer (collectives inside need all of them)."""
        return self.get([getattr(a, method).remote(*args) for a in self.trainers], deadline_s, method)

    def get(self, refs: list[Any], deadline_s: float | None, what: str, *, engines: bool = False) -> list[Any]:
        """Results of calls, in order.

        Args:
            engines: only engines are asked. Beside the trainers they can be started again (`EngineError`); a colocated
                one hangs or dies with its trainer, and the job must be (`TrainingError`).
        """
        fatal = self.fatal if engines else TrainingError
        try:
            return list(ray.get(refs, timeout=deadline_s))
        except GetTimeoutError:
            raise fatal(f"{what} did not end within {deadline_s:.0f} s on every worker: it hangs") from None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, DapoError):
                raise cause from error
            raise
        except RayActorError as error:
            kind = EngineError if error.actor_id in self._generator_ids() else TrainingError
            raise kind(f"a worker process died during {what}: {error}") from error
        except RayError as error:
            raise fatal(f"Ray lost a result of {what}: {error}") from error

    @property
    def fatal(self) -> type[DapoError]:
        """What a dead or hanging engine means."""
        return EngineError if self.generators else TrainingError

    def close(self) -> None:
        for actor in [*self.trainers, *self.generators]:
            ray.kill(actor)

    def _actor(self, kind: type, name: str) -> Any:
        return ray.remote(kind).options(**self._options, name=name)

    def _new_generators(self) -> list[Any]:
        count = self.config.rollout.devices
        return [self._actor(Generator, f"generator-{i}").remote(self.config, i) for i in range(count)]

    def _begin_generators(self) -> list[Any]:
        tp = self.config.rollout.tensor_parallel
        meet = [self._rendezvous(first) for first in self.generators[::tp]]
        return [actor.start.remote(meet[i // tp], self.weights) for i, actor in enumerate(self.generators)]

    def _join(self) -> None:
        """Trainer's rank 0 and all engines beside it make the group through which weights go."""
        if not self.generators:
            return
        members = [self.trainers[0], *self.generators]
        rendezvous = self._rendezvous(self.trainers[0])
        joining = [actor.join.remote(rendezvous, len(members)) for actor in members]
        self.get(joining, START_DEADLINE_S, "joining the group for weights")

    def _rendezvous(self, actor: Any) -> str:
        place: str = self.get([actor.rendezvous.remote()], START_DEADLINE_S, "starting")[0]
        return place

    def _generator_ids(self) -> set[str]:
        return {actor._actor_id.hex() for actor in self.generators}


def _actor_options(config: RunConfig) -> dict[str, Any]:
    kind = device.resolve(config.device)
    if kind == "cpu":
        threads = max(1, (os.cpu_count() or 1) // config.devices)
        env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        return {"num_cpus": 0, "runtime_env": {"env_vars": env}}
    name = "GPU" if kind == "cuda" else "NPU"
    have = int(ray.cluster_resources().get(name, 0))
    if have < config.devices:
        raise EnvironmentCheckError(
            f"model.parallel.world_size={config.model.parallel.world_size} and rollout.devices="
            f"{config.rollout.devices} need {config.devices} {name} devices, the cluster has {have}; lower them, or "
            f"join nodes with `ray start` (for NPUs Ray cannot count: --resources='{{\"NPU\": 16}}')"
        )
    return {"num_cpus": 0} | ({"num_gpus": 1} if kind == "cuda" else {"resources": {"NPU": 1}})


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
        engines = self.workers.engines
        replicas = len(engines) // tp
        ends_at = time.monotonic() + self.deadline_s
        open_streams: dict[Any, tuple[int, bool]] = {}
        for i, actor in enumerate(engines):
            replica = i // tp
            share = prompts[replica::replicas], params, begun[replica::replicas]
            # Ranks of one tensor-parallel group write the same; the first one is heard.
            open_streams[actor.stream.options(num_returns="streaming").remote(*share)] = replica, i % tp == 0
        failure: DapoError | None = None
        while open_streams:
            ready, _ = ray.wait(list(open_streams), timeout=max(0.0, ends_at - time.monotonic()))
            if not ready:
                raise failure or self.workers.fatal(f"generation did not end within {self.deadline_s:.0f} s: it hangs")
            replica, heard = open_streams[ready[0]]
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
            for done in part if heard else ():
                yield done._replace(prompt=replica + replicas * done.prompt)
        if failure is not None:
            raise failure

    def restart(self) -> None:
        self.workers.restart_engines()

    def sleep(self) -> None:
        """Colocated engines make room for the trainer; others have their device for themselves."""
        if not self.workers.generators:
            self.workers.call("sleep")

    def wake(self) -> bool:
        return not self.workers.generators and any(self.workers.call("wake"))


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
        workers = self.workers
        if not workers.generators:
            metrics: dict[str, float] = workers.call("sync", version)[0]
            return metrics
        sending = [trainer.send.remote() for trainer in workers.trainers]
        receiving = [generator.receive.remote(version) for generator in workers.generators]
        try:
            results = workers.get([*sending, *receiving], START_DEADLINE_S, "weight sync", engines=True)
            sent = results[0]
            for fingerprint in results[len(sending) :]:
                compare_fingerprints(trainer=sent.fingerprint, engine=fingerprint)
        except EngineError:
            workers.call("forget_engines")
            raise
        return dict(sent.metrics)

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
