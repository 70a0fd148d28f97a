"""TRL's side of `benchmarks.train_step`: its GRPOTrainer on given responses; started by it, in TRL's own environment.

Nothing of TRL is changed but where responses come from: they are read from the work file instead of being sampled.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from dapo import torchvision_cpu

torchvision_cpu.install()

import torch  # all of these end up importing torchvision
from transformers import TrainerCallback
from trl import GRPOTrainer

from benchmarks.trl_setup import GROUP, UPDATES, dapo_config, dataset, load
from benchmarks.turns import answer, wait_for_turn


class GivenResponses(GRPOTrainer):
    """Takes responses from the work file and notes how long its phases take."""

    work: dict[tuple[int, ...], dict[str, Any]]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        self.seen = []
        taken: dict[tuple[int, ...], int] = {}
        for ids in map(tuple, prompt_ids):
            index = taken[ids] = taken.get(ids, -1) + 1
            self.seen.append((self.work[ids]["number"], index))
        numbers = {row["number"]: row for row in self.work.values()}
        return [numbers[n]["responses"][i] for n, i in self.seen], None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        started = clocks()
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.logprob = [now - then for now, then in zip(clocks(), started, strict=True)]
            self.old = result[0]
        return result

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started = clocks()
        result = super()._generate_and_score_completions(inputs)
        self.rollout = [now - then for now, then in zip(clocks(), started, strict=True)]
        return result

    def logprobs(self) -> list[list[list[float]]]:
        out: list[list[list[float]]] = [[[] for _ in range(GROUP)] for _ in self.work]
        numbers = {row["number"]: row for row in self.work.values()}
        for row, (number, index) in zip(self.old, self.seen, strict=True):
            out[number][index] = row[: len(numbers[number]["responses"][index])].tolist()
        return out


def clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


class TakeTurns(TrainerCallback):
    """Waits for a line before each step, and answers with its times behind it."""

    trainer: GivenResponses

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % UPDATES == 0:
            wait_for_turn()
            self.started = clocks()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % UPDATES == 0:
            t = self.trainer
            step = [now - then for now, then in zip(clocks(), self.started, strict=True)]
            # What is left of a step without preparing responses: four forward and backward passes and updates.
            update = [whole - rollout for whole, rollout in zip(step, t.rollout, strict=True)]
            times = {"logprob": t.logprob[0], "logprob wall": t.logprob[1]}
            times |= {"update": update[0], "update wall": update[1]}
            answer(times | {"logprobs": t.logprobs()})


def main() -> None:
    folder, work, rounds, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    rows = json.loads(work.read_text())
    by_prompt = {tuple(row["prompt"]): row | {"number": number} for number, row in enumerate(rows)}
    data, (model, processor) = dataset(rows), load(folder)
    turns = TakeTurns()

    def reward(completions: Any, number: list[int], **_: Any) -> list[float]:
        return [rows[n]["rewards"][i] for n, i in turns.trainer.seen]

    trainer = GivenResponses(
        model, reward, dapo_config(len(rows), rounds), data, processing_class=processor, callbacks=[turns]
    )
    trainer.work, turns.trainer = by_prompt, trainer
    trainer.train()


if __name__ == "__main__":
    main()
