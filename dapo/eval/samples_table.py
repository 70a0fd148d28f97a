"""Answers to held-out prompts as rows of a table, with their images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dapo.types import Rollout, RolloutGroup

_PNG = b"\x89PNG"


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


def png(image: bytes) -> bytes:
    """An encoded image as PNG, which every browser shows."""
    if image.startswith(_PNG):
        return image
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).save(buffer, "PNG")
    return buffer.getvalue()
