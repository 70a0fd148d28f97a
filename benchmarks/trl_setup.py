"""What both TRL benchmarks share: data, model, and DAPO in TRL's configuration. Imported in TRL's own environment."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig

GROUP, UPDATES, MAX_TOKENS = 8, 4, 48


def dataset(rows: Sequence[dict[str, Any]]) -> Any:
    """The work file's prompts, numbered, each with its image."""
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": r["text"]}], "number": n} for n, r in enumerate(rows)]
    ).add_column("images", [[{"bytes": base64.b64decode(r["image"]), "path": None}] for r in rows])
    data.set_transform(_with_images)
    return data


def load(folder: Path) -> tuple[Any, Any]:
    """Model in float32, and processor."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), processor


def dapo_config(prompts: int, rounds: int, **more: Any) -> GRPOConfig:
    """`rounds` steps of `UPDATES` updates, each step over all `prompts`."""
    return GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        num_generations=GROUP,
        per_device_train_batch_size=prompts * GROUP // UPDATES,
        steps_per_generation=UPDATES,
        gradient_accumulation_steps=1,
        num_iterations=1,
        max_completion_length=MAX_TOKENS,
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
        **more,
    )


def _with_images(batch: dict[str, Any]) -> dict[str, Any]:
    decoded = [[Image.open(io.BytesIO(i["bytes"])) for i in images] for images in batch["images"]]
    return batch | {"images": decoded}
