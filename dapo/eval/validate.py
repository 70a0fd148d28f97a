"""Judged answers to held-out prompts as numbers and as rows of a table."""

from __future__ import annotations

import base64
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dapo.eval.estimate import accuracy_interval, majority, over_prompts, pass_at_k, powers_of_two_to
from dapo.observe.metrics import describe
from dapo.types import Rollout, RolloutGroup

_PNG = b"\x89PNG"


def summarise(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """`val/...` metrics of docs/metrics.md; a failed check is left out of every mean and counted in `val/failed`.

    With n > 1 samples per prompt also `val/mean_at_n`, `val/maj_at_n` and `val/pass_at_k` (k: powers of two, and n).
    """
    rollouts = [r for g in groups for r in g.rollouts]
    scored = [s for r in rollouts if (s := r.scored) is not None]
    accuracy = accuracy_interval(list(prompt_accuracies(groups).values()))
    lengths = describe([r.length for r in rollouts])
    metrics = {
        "val/accuracy": accuracy.value,
        "val/accuracy_low": accuracy.low,
        "val/accuracy_high": accuracy.high,
        "val/format": describe([s.format for s in scored])["mean"],
        "val/length_mean": lengths["mean"],
        "val/length_max": lengths["max"],
        "val/truncated": sum(r.truncated for r in rollouts) / max(len(rollouts), 1),
        "val/failed": (len(rollouts) - len(scored)) / max(len(rollouts), 1),
        "val/prompts": len(groups),
        "val/responses": len(rollouts),
    }
    metrics |= over_prompts([found for g in groups if (found := _several_samples(g))])
    slices: dict[str, list[RolloutGroup]] = defaultdict(list)
    for group in groups:
        for tag in group.prompt.tags:
            slices[re.sub(r"[^\w.\- :]", "_", tag)].append(group)  # MLflow allows nothing else in a name
    for tag, members in sorted(slices.items()):
        metrics[f"val/slice/{tag}/accuracy"] = describe(list(prompt_accuracies(members).values()))["mean"]
        metrics[f"val/slice/{tag}/prompts"] = len(members)
    return metrics


def prompt_accuracies(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Share of right answers per prompt id, among those with a verdict; prompts without any are left out."""
    judged = {g.prompt.id: [r.correct for r in g.rollouts if not r.failed] for g in groups}
    return {prompt: sum(verdicts) / len(verdicts) for prompt, verdicts in judged.items() if verdicts}


def table_rows(groups: Sequence[RolloutGroup], rows: int) -> list[dict[str, Any]]:
    """The first sample of the first `rows` prompts (the same in every validation), as `RunFolder.validation_table`."""
    return [_row(group, group.rollouts[0]) for group in groups[:rows]]


def _row(group: RolloutGroup, rollout: Rollout) -> dict[str, Any]:
    scored = rollout.scored
    return {
        "id": group.prompt.id,
        "question": group.prompt.question,
        "answer": group.prompt.answer,
        "response": rollout.text,
        "extracted": scored.extracted if scored else "",
        "accuracy": scored.accuracy if scored else None,
        "format": scored.format if scored else None,
        "tokens": rollout.length,
        "truncated": rollout.truncated,
        "images": [base64.b64encode(png(image)).decode() for image in group.prompt.images],
        "tags": list(group.prompt.tags),
    }


def _several_samples(group: RolloutGroup) -> dict[str, float]:
    judged = [s for r in group.rollouts if (s := r.scored) is not None]
    samples, n = len(group.rollouts), len(judged)
    if samples == 1 or not n:
        return {}
    right = sum(s.accuracy for s in judged)
    elected = judged[majority([s.extracted for s in judged], range(n))]
    metrics = {f"val/mean_at_{samples}": right / n, f"val/maj_at_{samples}": float(elected.accuracy)}
    for k in powers_of_two_to(samples):
        if k <= n:
            metrics[f"val/pass_at_{k}"] = pass_at_k(n, right, k)
    return metrics


def png(image: bytes) -> bytes:
    """An encoded image as PNG, which every browser shows."""
    if image.startswith(_PNG):
        return image
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).save(buffer, "PNG")
    return buffer.getvalue()
