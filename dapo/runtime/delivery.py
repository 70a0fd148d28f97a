"""The engine gets the trainer's weights, and proves that it computes with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from dapo.config.run import RunConfig
from dapo.errors import EngineError
from dapo.observe.journal import Journal, read
from dapo.rollout.verification import check_probe, default_tolerance
from dapo.runtime.generation import EngineClient
from dapo.runtime.proof import probe
from dapo.train.policy import SyncedPolicy
from dapo.types import Prompt, SamplingParams

RESTARTED = "engine_restarted"
SLEPT_IN_VAIN = "sleep_freed_nothing"
PROBE_PROMPTS = 4
PROBE_TOKENS = 64


class WeightDelivery:
    """One run's syncs. Fingerprints are compared in each (`SyncedPolicy.sync`): they prove what was given. A log-prob
    probe proves what the engine computes with: at the start, every `rollout.probe_every` steps, after each restart, and
    after each wake-up of an engine that slept.

    Args:
        held_out: the first `PROBE_PROMPTS` of them are asked.
        sampling: how training samples now, so that temperature and banned ids are compared, too.
    """

    def __init__(
        self,
        config: RunConfig,
        journal: Journal,
        policy: SyncedPolicy,
        engine: EngineClient,
        held_out: Sequence[Prompt],
        sampling: Callable[[], SamplingParams],
    ) -> None:
        self.config, self.journal, self.policy, self.engine = config, journal, policy, engine
        self.prompts, self.sampling = held_out[:PROBE_PROMPTS], sampling
        self.restarts = sum(e.kind == "alarm" and e.data["name"] == RESTARTED for e in read(journal.path))
        """Of the engine, since the run began: earlier attempts are counted."""
        self._proved = False
        self._of_step: dict[int, int] = {}

    def deliver(self, step: int, version: int) -> dict[str, float]:
        """One sync.

        Returns:
            its metrics, with the probe's where there was one.

        An engine that dies meanwhile is restarted and sent all weights, as often as `rollout.restarts` allows.

        Raises:
            EngineError: it died more often than that.
            ProofError: a tensor did not arrive, or the engine computes something else than the trainer.
        """
        while True:
            try:
                return self._deliver(step, version)
            except EngineError as error:
                self.restart(step, error)

    def sleep(self, step: int) -> dict[str, float]:
        """Let the engine make room for the trainer until the next `deliver`; its metrics."""
        freed = self.engine.sleep()
        if freed is None:
            return {}
        if freed <= 0:
            message = "the engine's sleep freed no memory; the trainer may run out of it"
            self.journal.append("alarm", step, name=SLEPT_IN_VAIN, message=message)
        return {"engine/sleep_freed_gb": freed / 1e9}

    def restart(self, step: int, error: EngineError) -> None:
        """Start the engine anew, because of `error`, and again where it does not start. It holds the weights the run
        started from: deliver next.

        Raises:
            EngineError: the last one, when this step has used up its `rollout.restarts`.
        """
        self._proved = False
        while True:
            self._of_step = {step: self._of_step.get(step, 0) + 1}
            if self._of_step[step] > self.config.rollout.restarts:
                raise error
            self.restarts += 1
            self.journal.append("alarm", step, name=RESTARTED, message=str(error))
            try:
                self.engine.restart()
            except EngineError as failed:
                error = failed
            else:
                return

    def _deliver(self, step: int, version: int) -> dict[str, float]:
        # A sync wakes the weights alone: while they are gathered, the cache's memory is still the trainer's.
        metrics = self.policy.sync(version)
        woke = self.engine.wake()
        every = self.config.rollout.probe_every
        if woke or not self._proved or (every and step % every == 0):
            metrics = metrics | self._prove(step)
        return metrics

    def _prove(self, step: int) -> dict[str, float]:
        params, started = self.sampling(), time.perf_counter()
        gap = probe(
            self.engine,
            self.policy,
            self.prompts,
            replace(params, n=1, max_tokens=min(PROBE_TOKENS, params.max_tokens), finish_share=1.0),
            ranks=self.config.data_parallel,
            tokens_per_pack=self.config.batch.tokens_per_pack,
        )
        after = f"the sync of step {step}" if step else "the start"
        tolerance = default_tolerance(self.config.model.compute_dtype, self.config.engine_dtype)
        check_probe(gap, self.config.rollout.probe_tolerance or tolerance, after=after)
        self._proved = True
        seconds = time.perf_counter() - started
        return {"engine/probe_mean": gap.mean, "engine/probe_max": gap.largest, "time/probe": seconds}
