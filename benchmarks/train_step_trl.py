"""The rival of `benchmarks.train_step`: TRL's GRPOTrainer on given responses; started by it, in TRL's own environment.

Nothing of TRL is changed but where responses come from: they are read from the work file instead of being sampled.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dapo import torchvision_cpu

torchvision_cpu.install()

import torch  # all of these end up importing torchvision
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.turns import answer, wait_for_turn

GROUP, UPDATES = 8, 4


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
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": r["text"]}], "number": n} for n, r in enumerate(rows)]
    ).add_column("images", [[{"bytes": base64.b64decode(r["image"]), "path": None}] for r in rows])
    data.set_transform(_with_pictures)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        num_generations=GROUP,
        per_device_train_batch_size=len(rows) * GROUP // UPDATES,
        steps_per_generation=UPDATES,
        gradient_accumulation_steps=1,
        num_iterations=1,
        max_completion_length=48,
        mask_truncated_completions=False,
        max_steps=UPDATES * rounds,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    turns = TakeTurns()

    def reward(completions: Any, number: list[int], **_: Any) -> list[float]:
        return [rows[n]["rewards"][i] for n, i in turns.trainer.seen]

    trainer = GivenResponses(model, reward, config, data, processing_class=processor, callbacks=[turns])
    trainer.work, turns.trainer = by_prompt, trainer
    trainer.train()


def _with_pictures(batch: dict[str, Any]) -> dict[str, Any]:
    pictures = [[Image.open(io.BytesIO(i["bytes"])) for i in images] for images in batch["images"]]
    return batch | {"images": pictures}


if __name__ == "__main__":
    main()
