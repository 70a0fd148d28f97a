"""Our side of `benchmarks.step_time`: the controller over one worker, in one process. Started by it."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.turns import answer, wait_for_turn
from dapo.config import io as config_io
from dapo.config.run import RunConfig
from dapo.data.processor import PromptProcessor
from dapo.observe.journal import Journal, read
from dapo.observe.run_folder import RunFolder
from dapo.rewards.pool import RewardPool
from dapo.rollout.engine import Begun
from dapo.runtime.actors import Trainer
from dapo.runtime.controller import Controller
from dapo.types import Completion, Finished, Prompt, SamplingParams

MAX_TOKENS, GROUP, UPDATES = 48, 8, 4


def grade(response: str, answer: str) -> bool:
    """Right for half of all responses."""
    return sum(response.encode()) % 2 == 0


class Endless:
    """No id ends a response, so all have full length."""

    stop_token_ids: tuple[int, ...] = ()

    def __init__(self, processor: PromptProcessor) -> None:
        self.banned_token_ids, self.decode_many = processor.banned_token_ids, processor.decode_many


class LocalEngine:
    """A worker's engine without Ray, as the controller asks for it."""

    def __init__(self, worker: Trainer) -> None:
        self.worker = worker

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun = ()) -> Iterator[Finished]:
        return self.worker.engine.stream(prompts, params, begun)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        return self.worker.engine.generate(prompts, params)

    def restart(self) -> None:
        self.worker.restart_engine()

    def sleep(self) -> None:
        self.worker.sleep()

    def wake(self) -> None:
        self.worker.wake()


def main() -> None:
    folder, work, engine, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    prompts = [_prompt(number, row, PromptProcessor(folder)) for number, row in enumerate(json.loads(work.read_text()))]
    with tempfile.TemporaryDirectory() as root, RewardPool("benchmarks.step_time_ours:grade") as rewards:
        config = _config(engine, dtype, len(prompts), root)
        run = RunFolder.of(config)
        run.root.mkdir(parents=True)
        worker = Trainer(config, rank=0, world=1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        worker.start(f"127.0.0.1:{port}", str(folder))
        processor = worker.processor
        controller = Controller(
            config,
            run,
            Journal(run.journal),
            worker,
            LocalEngine(worker),
            rewards,
            prompts,
            prompts,
            Endless(processor),
        )
        controller.sync()
        while True:
            wait_for_turn()
            controller.step()
            answer(_did(run, prompts))


def _did(run: RunFolder, prompts: list[Prompt]) -> dict[str, int]:
    step = [event for event in read(run.journal) if event.kind == "step"][-1].data["metrics"]
    responses = len(prompts) * GROUP
    return {
        "responses": responses,
        "prompt_tokens": GROUP * sum(len(prompt.token_ids) for prompt in prompts),
        "response_tokens": round(step["response/length_mean"] * responses),
        "updates": UPDATES,
    }


def _config(engine: str, dtype: str, prompts: int, root: str) -> RunConfig:
    return config_io.validate(
        {
            "device": "cpu",
            "run_root": root,
            "model": {
                "compute_dtype": "float32",
                "gradient_checkpointing": False,
                "optimizer": {"lr": 1e-6, "warmup_updates": 0},
            },
            "algorithm": {"sampling": {"enabled": False}},
            "data": {"max_prompt_tokens": 256},
            "batch": {
                "prompts_per_step": prompts,
                "prompts_per_round": prompts,
                "prompts_per_update": prompts // UPDATES,
                "group_size": GROUP,
                "max_response_tokens": MAX_TOKENS,
                "tokens_per_pack": 3072,
            },
            "rollout": {"engine": engine, "dtype": dtype},
            "train": {"epochs": 1_000_000},
        }
    )


def _prompt(number: int, row: dict[str, Any], processor: PromptProcessor) -> Prompt:
    image = base64.b64decode(row["image"])
    ids, grids = processor.encode(row["text"], [image])
    return Prompt(f"b/{number}", ids, (image,), grids, "1", row["text"])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
