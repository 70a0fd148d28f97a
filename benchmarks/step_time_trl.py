"""TRL's side of `benchmarks.step_time`: its GRPOTrainer; started by it, in TRL's own environment.

With `generate()` TRL runs as it is. With vLLM on CPU it takes the two repairs of `OnCpu`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dapo import torchvision_cpu

torchvision_cpu.install()

import torch  # all of these end up importing torchvision
import trl.trainer.grpo_trainer
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from benchmarks.trl_setup import UPDATES, dapo_config, dataset, load
from benchmarks.turns import answer, wait_for_turn


class OnCpu(VLLMGeneration):  # type: ignore[misc]
    """What TRL 1.16 needs to run with vLLM 0.32 on CPU."""

    def sync_weights(self) -> None:
        """TRL loads into the layers one by one; on CPU vLLM has packed them, and they cannot be loaded any more:
        AttributeError: 'Parameter' object has no attribute 'weight_loader'. Nor does it drop image features of the
        old weights; vLLM's own reload does, and must be made to forget that it has them."""
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(weights_iterator=self._iter_named_params())
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def generate(self, prompts: Any, images: Any = None, **more: Any) -> Any:
        """TRL passes image tokens that are expanded already, and vLLM would silently expand them once more."""
        pad = self.processing_class.image_token_id
        short = [[t for t, last in zip(ids, [None, *ids], strict=False) if t != pad or last != pad] for ids in prompts]
        return super().generate(short, images, **more)


class Counted(GRPOTrainer):  # type: ignore[misc]
    """Notes how much a step generated."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        result = super()._generate_and_score_completions(inputs)
        self.did = {
            "responses": len(result["completion_mask"]),
            "prompt_tokens": int(result["prompt_mask"].sum()),
            "response_tokens": int(result["completion_mask"].sum()),
        }
        return result


class TakeTurns(TrainerCallback):  # type: ignore[misc]
    """A step is one generation and the updates on it."""

    trainer: Counted

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % UPDATES == 0:
            wait_for_turn()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % UPDATES == 0:
            answer(self.trainer.did | {"updates": UPDATES})


def main() -> None:
    folder, work, backend, rounds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    rows = json.loads(work.read_text())
    data, (model, processor) = dataset(rows), load(folder)
    ids = model.config
    # Full length, and no placeholder of an image inside an answer, as on our side.
    banned = [ids.image_token_id, ids.video_token_id, ids.vision_start_token_id, ids.vision_end_token_id]
    banned += [processor.tokenizer.eos_token_id]
    never = {"suppress_tokens": banned} if backend == "generate" else {"logit_bias": dict.fromkeys(banned, -100.0)}
    config = dapo_config(
        len(rows),
        rounds,
        disable_tqdm=True,
        generation_kwargs=never,
        use_vllm=backend == "vllm",
        vllm_mode="colocate",
        vllm_max_model_length=512,
    )
    turns = TakeTurns()
    trl.trainer.grpo_trainer.VLLMGeneration = OnCpu

    def reward(completions: Any, **_: Any) -> list[float]:
        return [float(sum(c[0]["content"].encode()) % 2 == 0) for c in completions]

    turns.trainer = Counted(model, reward, config, data, processing_class=processor, callbacks=[turns])
    turns.trainer.train()


if __name__ == "__main__":
    main()
