"""Engines that are started anew, on real actors with a small real model: what they hold afterwards is the trainer's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from dapo.config import io
from dapo.data.processor import PromptProcessor
from dapo.observe.journal import Journal, read
from dapo.runtime.delivery import WeightDelivery
from dapo.runtime.ray_clients import RayEngine, RayPolicy
from dapo.runtime.workers import Workers
from tests.rollout.small import make_folder, make_prompts, sampling

pytestmark = pytest.mark.slow

PATHS = {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
DEADLINE_S = 15.0


class Run:
    """One trainer, and one engine with it or on a device of its own."""

    def __init__(self, folder: Path, devices: int) -> None:
        config = io.validate(
            {
                "device": "cpu",
                "data": {"max_prompt_tokens": 128},
                "batch": {"max_response_tokens": 128},
                "algorithm": {"overlong": {"buffer_tokens": 64}},
                "model": {"compute_dtype": "float32"},
                "rollout": {
                    "engine": "transformers",
                    "devices": devices,
                    "deadline_s": DEADLINE_S,
                    "temperature": 0.8,
                },
            }
        )
        weights = make_folder(folder / "model", "dense")
        processor = PromptProcessor(weights)
        self.workers = Workers(config)
        self.workers.ready(self.workers.begin(weights))
        self.journal = Journal(folder / "journal.jsonl")
        self.prompts = make_prompts(processor, 2)
        self.params = replace(sampling(processor, n=2), max_tokens=8)
        self.engine = RayEngine(self.workers)
        self.delivery = WeightDelivery(
            config, self.journal, RayPolicy(self.workers), self.engine, self.prompts, lambda: self.params
        )

    @property
    def alarms(self) -> list[str]:
        return [event.data["message"] for event in read(self.journal.path) if event.kind == "alarm"]


def process_of(actor: str) -> psutil.Process:
    (found,) = [p for p in psutil.Process().children(recursive=True) if p.cmdline()[:1] == [f"ray::{actor}"]]
    return found


@pytest.fixture(autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": dict(PATHS)})
    yield
    ray.shutdown()


def test_a_colocated_engine_that_is_started_anew_gets_everything(tmp_path: Path) -> None:
    run = Run(tmp_path, devices=0)
    whole = run.delivery.deliver(0, 0)["engine/sync_gb"]
    assert whole > 0
    assert run.delivery.deliver(1, 1)["engine/sync_gb"] == 0, "nothing changed"
    written = run.engine.generate(run.prompts, run.params)
    run.engine.restart()
    assert run.delivery.deliver(2, 1)["engine/sync_gb"] == whole
    assert run.engine.generate(run.prompts, run.params) == written
    run.workers.close()


def test_an_engine_beside_the_trainer_that_hangs_or_dies_in_a_sync_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path, devices=1)
    whole = run.delivery.deliver(0, 0)["engine/sync_gb"]
    trainer, stopped = process_of("Trainer"), process_of("Generator")
    stopped.suspend()
    metrics = run.delivery.deliver(1, 1)
    assert metrics["engine/sync_gb"] == whole
    assert metrics["engine/probe_mean"] < 1e-4
    assert not stopped.is_running()
    process_of("Generator").kill()
    metrics = run.delivery.deliver(2, 2)
    assert metrics["engine/sync_gb"] == whole
    assert metrics["engine/probe_mean"] < 1e-4
    hung, died = run.alarms
    assert "weight sync did not end within 15 s on generator-0" in hung
    assert "generator-0 died during weight sync" in died
    assert trainer.is_running()
    assert run.delivery.restarts == 2
    run.workers.close()
