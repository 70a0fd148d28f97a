"""Validation metrics and table rows from judged answers."""

from __future__ import annotations

import base64
import io
import json
import math
import re

import pytest
from PIL import Image

from dapo.eval.validate import prompt_accuracies, summarise, table_rows
from tests.records import group, prompt


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


def test_accuracy_is_the_mean_over_prompts_with_its_interval() -> None:
    metrics = summarise([group(str(i), [i < 8]) for i in range(10)])
    assert metrics["val/accuracy"] == 0.8
    assert (metrics["val/accuracy_low"], metrics["val/accuracy_high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert metrics["val/prompts"] == metrics["val/responses"] == 10
    assert not any("_at_" in name for name in metrics)


def test_a_failed_check_is_counted_and_is_not_a_wrong_answer() -> None:
    metrics = summarise([group("a", [True]), group("b", [None]), group("c", [False]), group("d", [None, True])])
    assert metrics["val/accuracy"] == pytest.approx(2 / 3)
    assert metrics["val/failed"] == 2 / 5
    assert metrics["val/format"] == 0.5


def test_nothing_judged_is_not_an_accuracy_of_zero() -> None:
    assert math.isnan(summarise([group("a", [None])])["val/accuracy"])


def test_lengths_and_truncation_count_every_response() -> None:
    metrics = summarise([group("a", [True, False], lengths=[2, 10], cut=[1])])
    assert metrics["val/length_mean"] == 6
    assert metrics["val/length_max"] == 10
    assert metrics["val/truncated"] == 0.5


def test_several_samples_give_mean_pass_and_majority() -> None:
    metrics = summarise([group("a", [True, True, True, False]), group("b", [False, False, False, False])])
    assert metrics["val/mean_at_4"] == pytest.approx(3 / 8)
    assert metrics["val/pass_at_2"] == 0.5  # of "a", every pair has a right answer; of "b", none
    assert metrics["val/pass_at_4"] == 0.5
    assert metrics["val/maj_at_4"] == 0.5


def test_slices_are_measured_by_tag() -> None:
    groups = [
        group("a", [True], asked=prompt("a", tags=("shape:circle", "hard"))),
        group("b", [False], asked=prompt("b", tags=("shape:circle",))),
        group("c", [True], asked=prompt("c", tags=("a,b",))),
    ]
    metrics = summarise(groups)
    assert metrics["val/slice/shape:circle/accuracy"] == 0.5
    assert metrics["val/slice/shape:circle/prompts"] == 2
    assert metrics["val/slice/hard/accuracy"] == 1.0
    assert metrics["val/slice/a_b/accuracy"] == 1.0
    # What MLflow takes as the name of a metric.
    assert all(re.fullmatch(r"[/\w.\- :]+", name) for name in metrics)


def test_accuracies_per_prompt_are_kept_for_paired_comparison() -> None:
    groups = [group("a", [True, False]), group("b", [None, True]), group("c", [None])]
    assert prompt_accuracies(groups) == {"a": 0.5, "b": 1.0}


def test_table_rows_show_the_first_prompts_with_their_images_as_png() -> None:
    asked = prompt("val/0", question="area?", answer="12", images=(picture("JPEG"), picture("PNG")), tags=("x",))
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
