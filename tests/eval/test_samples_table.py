"""Rows of the table of answers."""

from __future__ import annotations

import base64
import io
import json

from PIL import Image

from dapo.eval.samples_table import table_rows
from tests.records import group, prompt


def image_bytes(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


def test_table_rows_show_the_first_prompts_with_their_images_as_png() -> None:
    asked = prompt(
        "val/0", question="area?", answer="12", images=(image_bytes("JPEG"), image_bytes("PNG")), tags=("x",)
    )
    rows = table_rows([group("val/0", [True], cut=[0], asked=asked), group("val/1", [None]), group("c", [True])], 2)
    assert [row["id"] for row in json.loads(json.dumps(rows))] == ["val/0", "val/1"]
    first, second = rows
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in first["images"])
    assert len(first["images"]) == 2
    del first["images"]
    assert first == {
        "id": "val/0",
        "question": "area?",
        "answer": "12",
        "response": "answer 0",
        "extracted": "1",
        "accuracy": True,
        "format": 0.5,
        "tokens": 2,
        "truncated": True,
        "tags": ["x"],
    }
    assert second["accuracy"] is None
