"""A real trainer and the engine beside it in this process, joined as a run joins them: sync, fingerprint, probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dapo.config import io
from dapo.observe.journal import Journal
from dapo.runtime.actors import Trainer
from dapo.runtime.delivery import WeightDelivery
from tests.rollout.processes import free_address
from tests.rollout.small import make_prompts, sampling, shake


class Delivered:
    """`deliver` is the run's own; a fault set between two calls meets what a run would do about it."""

    def __init__(self, folder: Path, journal: Path, **rollout: Any) -> None:
        config = io.validate(
            {
                "device": "cpu",
                "model": {"compute_dtype": "float32"},
                "rollout": {"temperature": 0.8, "kv_cache_mib": 32, "max_num_seqs": 32} | rollout,
                "data": {"max_prompt_tokens": 128},
                "batch": {"max_response_tokens": 24, "tokens_per_pack": 512},
            }
        )
        self.worker = Trainer(config, 0, 1)
        self.worker.start(free_address(), str(folder))
        processor: Any = self.worker.processor
        worker: Any = self.worker  # of one worker: its engine dies for good
        self._delivery = WeightDelivery(
            config, Journal(journal), worker, worker.engine, make_prompts(processor, 4), lambda: sampling(processor)
        )
        self._version = -1

    def update(self) -> None:
        """The trainer moves, as far as one can see."""
        shake(self.worker.policy.model, 0.05, seed=self._version)

    def deliver(self) -> float:
        """One sync with its proof; the probe's mean gap, nats."""
        self._version += 1
        return self._delivery.deliver(self._version, self._version)["engine/probe_mean"]


@contextmanager
def delivered(folder: Path, journal: Path, **rollout: Any) -> Iterator[Delivered]:
    run = Delivered(folder, journal, **rollout)
    try:
        yield run
    finally:
        run.worker.engine.close()
        run.worker.policy.close()
