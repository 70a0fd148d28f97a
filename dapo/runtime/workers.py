"""All actors of a run: start, restart, calls with a deadline, and failures as one sentence each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from dapo import device
from dapo.config.run import RunConfig
from dapo.errors import ConfigError, DapoError, EngineError, EnvironmentCheckError, TrainingError
from dapo.runtime.actors import Generator, Trainer


class Deadline(NamedTuple):
    """How long a call may take before its worker counts as hung."""

    seconds: float
    key: str | None = None
    """Of the configuration, where it can be raised."""


START = Deadline(600.0)
WRITE = Deadline(1800.0)


class Workers:
    """One actor per device: the trainers and, with `rollout.devices`, engines beside them. Calls them, and turns what
    goes wrong into one sentence.

    Raises:
        EnvironmentCheckError: the cluster has fewer devices than the run needs.
    """

    _hung: str | None = None
    """Which trainer does not answer any more."""

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

    @property
    def engine_deadline(self) -> Deadline:
        """Of what waits for engines alone, or moves weights."""
        return Deadline(self.config.rollout.deadline_s, "rollout.deadline_s")

    def begin(self, weights: Path) -> list[Any]:
        """Start loading everywhere; returns at once with what `ready` waits for."""
        self.weights = str(weights)
        rendezvous = self._rendezvous(self.trainers[0])
        return [a.start.remote(rendezvous, self.weights) for a in self.trainers] + self._begin_generators()

    def ready(self, loading: list[Any]) -> list[Any]:
        """Wait for what `begin` began; returns host, process and device of each actor."""
        places = self.get(loading, START, "loading the weights")
        self._join()
        return places

    def restart_engines(self) -> None:
        """Start new processes for engines on devices of their own, whatever became of the old ones.

        Raises:
            EngineError: they do not start. The configuration is not to blame, for it started them before: the memory of
                the old ones may not be free yet.
            TrainingError: a trainer hangs or died.
        """
        try:
            if not self.generators:
                self.call("restart_engine", deadline=START)
                return
            for actor in self.generators:
                ray.kill(actor)
            # A sync that waits for the old ones ends with them; who does not answer now hangs by itself.
            self.call("forget_engines", deadline=START)
            self.generators = self._new_generators()
            self.get(self._begin_generators(), START, "restarting the engines", engines=True)
        except ConfigError as error:
            raise EngineError(f"an engine that ran before did not start again: {error}") from error
        self._join()

    def call(self, method: str, *args: Any, deadline: Deadline | None = None) -> list[Any]:
        """The same call on every trainer (collectives inside need all of them).

        Args:
            deadline: None: `train.deadline_s`.

        Raises:
            TrainingError: one of them hangs or died; at once, where one was found to hang before.
        """
        if self._hung is not None:
            raise TrainingError(self._hung)
        refs = [getattr(actor, method).remote(*args) for actor in self.trainers]
        return self.get(refs, deadline or Deadline(self.config.train.deadline_s, "train.deadline_s"), method)

    def get(self, refs: list[Any], deadline: Deadline | None, what: str, *, engines: bool = False) -> list[Any]:
        """Results of calls, in order.

        Args:
            engines: only engines are waited for. Beside the trainers they can be started again (`EngineError`); a
                colocated one hangs with its trainer, and the job must be (`TrainingError`).
        """
        ends_at = time.monotonic() + deadline.seconds if deadline else None
        results: dict[Any, Any] = {}
        late = list(refs)
        while late:
            left = max(0.0, ends_at - time.monotonic()) if ends_at else None
            done, late = ray.wait(late, timeout=left)
            if deadline and not done:
                raise self.hang(map(self._name, late), deadline, what, engines=engines)
            for ref in done:
                results[ref] = self._result(ref, what)
        return [results[ref] for ref in refs]

    def _result(self, ref: Any, what: str) -> Any:
        """What a call that ended came to. Whatever goes wrong in an engine beside the trainers is an `EngineError`:
        a new process may help."""
        name = self._name(ref)
        fatal = TrainingError if name.startswith("trainer") else EngineError
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, DapoError):
                raise cause from error
            if fatal is TrainingError:
                raise
            raise EngineError(f"{what} failed on {name}: {type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            raise fatal(f"the worker process {name} died during {what}: {error}") from error
        except RayError as error:
            raise fatal(f"Ray lost a result of {what} on {name}: {error}") from error

    def _name(self, ref: Any) -> str:
        """Of the worker that was called."""
        actor = ref.task_id().actor_id()
        named = [(f"trainer-{i}", a) for i, a in enumerate(self.trainers)]
        named += [(f"generator-{i}", a) for i, a in enumerate(self.generators)]
        return next((name for name, one in named if one._actor_id == actor), "an engine that was replaced")

    def hang(self, names: Iterable[str], deadline: Deadline, what: str, *, engines: bool) -> DapoError:
        """The error for workers that did not answer in time, to be raised. See `get`."""
        remedy = f"; raise {deadline.key} if it only takes long" if deadline.key else ""
        message = f"{what} did not end within {deadline.seconds:.0f} s on {', '.join(sorted(names))}: it hangs{remedy}"
        if engines and self.generators:
            return EngineError(message)
        self._hung = message
        return TrainingError(message)

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
        self.get(joining, START, "joining the group for weights")

    def _rendezvous(self, actor: Any) -> str:
        place: str = self.get([actor.rendezvous.remote()], START, "starting", engines=actor in self.generators)[0]
        return place


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
