"""The supervised phase of the tiny model: it learns to answer in the right form, and is right about half of the time.

The teacher is careless: in `wrong_share` of the demonstrations it takes a formula at random, regardless of the figure.
What is left to reinforcement learning is to find out which formula is rewarded.

Instead of sampling the teacher, every question is shown with all formulas, each weighted by how often the teacher uses
it: the expected loss without its noise, and the question with its image is computed once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dapo import torchvision_cpu
from dapo.config.model import TinyModel
from dapo.data.images import encode_png
from dapo.data.processor import PromptProcessor
from dapo.data.synthetic import FIGURES, Exercise, draw_exercises
from dapo.model.rope import mrope_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dapo.data.storage import Progress


_CHOICE = 1
"""Place of the token that decides for a formula: `<think>` comes before it."""
_CHOICE_WEIGHT = 4.0
"""Its weight in the loss: it is one token in thirteen, and the only one that depends on the image."""


def warm_up(model: PreTrainedModel, folder: Path, source: TinyModel, progress: Progress) -> None:
    """Train in place for `source.warmup_steps` steps of `source.warmup_batch` demonstrations, on one thread.

    Args:
        model: on the CPU, float32.
        folder: the model's tokenizer and processor.
        source: the same source gives the same weights on the same machine.
        progress: called after every step.
    """
    questions = max(1, source.warmup_batch // len(FIGURES["area"]))
    stream = draw_exercises("train", source.seed)
    batches = _Batches(folder, source.wrong_share)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=source.warmup_lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, source.warmup_steps))
    model.train()
    with _fast_for_small_matrices():
        for step in range(1, source.warmup_steps + 1):
            loss = batches.loss(model, list(islice(stream, questions)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress(step, source.warmup_steps, f"loss {loss.item():.3f}")
    model.eval()


@contextmanager
def _fast_for_small_matrices() -> Iterator[None]:
    """Linear layers by oneDNN (a third less time in all; still float32 where the CPU has no bfloat16 tiles), attention
    without the flash kernel, which is slow in that mode, and one thread: with two, a busy machine of two cores spent a
    hundred times as long at OpenMP's barriers as at work."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(1)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short rise, then a cosine down to a twentieth."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass(frozen=True, slots=True)
class _Row:
    """An exercise as the model reads it in training: the question once, then its demonstrations side by side."""

    token_ids: Tensor
    positions: Tensor
    """[3, L]; each demonstration starts right behind the question."""
    visible: Tensor
    """[L, L] bool: a demonstration sees the question and itself."""
    before: Tensor
    """[T] the token that predicts each target; the question's last one for all first targets."""
    targets: Tensor
    """[T] ids of all demonstrations."""
    weights: Tensor
    """[T] how often the teacher writes the demonstration."""


def _make_row(
    exercise: Exercise, image: Image.Image, processor: PromptProcessor, tokenizer: Any, wrong_share: float
) -> _Row:
    prompt, grids = processor.encode(exercise.text, [encode_png(image)])
    figures = FIGURES[exercise.question]
    token_ids, segments, before, targets, weights = list(prompt), [0] * len(prompt), [], [], []
    start = mrope_positions(prompt, grids, image_token_id=processor.image_token_id, merge_size=processor.merge_size)
    positions = [start]
    for number, figure in enumerate(figures, start=1):
        answer = [*tokenizer.encode(exercise.demonstration(figure), add_special_tokens=False), tokenizer.eos_token_id]
        before += [len(prompt) - 1, *range(len(token_ids), len(token_ids) + len(answer) - 1)]
        targets += answer
        share = wrong_share / len(figures) + (1 - wrong_share) * (figure == exercise.figure)
        weights += [share * (_CHOICE_WEIGHT if place == _CHOICE else 1.0) for place in range(len(answer))]
        token_ids += answer
        segments += [number] * len(answer)
        positions.append((start.max() + 1 + torch.arange(len(answer))).expand(3, -1))
    segment = torch.tensor(segments)
    visible = torch.ones(len(segment), len(segment), dtype=torch.bool).tril()
    visible &= (segment == segment[:, None]) | (segment == 0)
    return _Row(
        torch.tensor(token_ids),
        torch.cat(positions, dim=1),
        visible,
        torch.tensor(before),
        torch.tensor(targets),
        torch.tensor(weights),
    )


class _Batches:
    """Turns exercises with images into losses; remembers what depends on the exercise alone."""

    def __init__(self, folder: Path, wrong_share: float) -> None:
        self._processor = PromptProcessor(folder)
        torchvision_cpu.install()
        from transformers import AutoProcessor

        loaded = AutoProcessor.from_pretrained(folder)
        self._tokenizer, self._images = loaded.tokenizer, loaded.image_processor
        self._wrong_share = wrong_share
        self._rows: dict[Exercise, _Row] = {}

    def loss(self, model: PreTrainedModel, drawn: Sequence[tuple[Exercise, Image.Image]]) -> Tensor:
        """Token-mean loss of the teacher's answers to these questions, in expectation over the teacher's choices."""
        rows = [self._row(exercise, image) for exercise, image in drawn]
        length = max(len(row.token_ids) for row in rows)
        token_ids = torch.full((len(rows), length), self._processor.pad_token_id)
        positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        # Padding looks at itself: a row of the softmax with everything masked would be NaN.
        visible = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1, 1)
        for i, row in enumerate(rows):
            n = len(row.token_ids)
            token_ids[i, :n] = row.token_ids
            positions[:, i, :n] = row.positions
            visible[i, 0, :n, :n] = row.visible
        pixels = self._images(images=[image for _, image in drawn], return_tensors="pt")
        hidden = model.model(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=visible,
            pixel_values=pixels["pixel_values"],
            image_grid_thw=pixels["image_grid_thw"],
            use_cache=False,
        ).last_hidden_state
        before = torch.cat([row.before + i * length for i, row in enumerate(rows)])
        logits = model.lm_head(hidden.flatten(0, 1)[before])
        losses = functional.cross_entropy(logits, torch.cat([row.targets for row in rows]), reduction="none")
        weights = torch.cat([row.weights for row in rows])
        return (losses * weights).sum() / weights.sum()

    def _row(self, exercise: Exercise, image: Image.Image) -> _Row:
        if exercise not in self._rows:
            self._rows[exercise] = _make_row(exercise, image, self._processor, self._tokenizer, self._wrong_share)
        return self._rows[exercise]
