"""A small finished run folder, as the job writes it."""

import base64
import io as bytes_io
import json
from pathlib import Path

from PIL import Image

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.observe import manifest
from dapo.observe.journal import Journal
from dapo.observe.run_folder import RunFolder

STEPS = 4


def make(root: Path, **tree: object) -> tuple[RunFolder, RunConfig, Journal]:
    """Started, validated at 0 and at the end, `STEPS` steps, one checkpoint, one alarm; not ended."""
    config = io.validate({"run_root": str(root / "runs"), **tree})
    folder = RunFolder.of(config)
    folder.root.mkdir(parents=True)
    io.save(config, folder.config)
    manifest.write(folder, root, root)
    journal = Journal(folder.journal)
    journal.append("started", 0, run_id=folder.id, attempt=1, total_steps=STEPS, derived=config.derived())
    validation(folder, journal, 0, 0.5)
    for step in range(1, STEPS + 1):
        metrics = {
            "reward/mean": 0.5 + step / 10,
            "groups/accuracy": 0.4 + step / 10,
            "train/entropy": 1.0 / step,
            "groups/kept": 3.0,
            "groups/all_right": 1.0,
            "groups/all_wrong": 0.0,
            "time/generate": 1.0,
            "time/update": 2.0,
            "time/step": 3.0,
        }
        journal.append("step", step, metrics=metrics, seconds_left=1.0)
    validation(folder, journal, STEPS, 0.75)
    journal.append(
        "checkpoint",
        STEPS,
        path=f"checkpoints/step-{STEPS:06d}",
        metrics={"val/accuracy": 0.75},
        best=True,
        seconds=1.0,
    )
    journal.append("alarm", STEPS, name="entropy_collapse", message="entropy 0.01 is below 0.02 nats")
    return folder, config, journal


def validation(folder: RunFolder, journal: Journal, step: int, accuracy: float) -> None:
    encoded = bytes_io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(encoded, "PNG")
    row = {
        "id": "test/0",
        "question": "a=3 b=4 <area>?",
        "answer": "12",
        "response": "<script>alert(1)</script> \\boxed{12}",
        "extracted": "12",
        "accuracy": step > 0,
        "format": 1.0,
        "tokens": 9,
        "truncated": False,
        "images": [base64.b64encode(encoded.getvalue()).decode()],
        "tags": [],
    }
    table = folder.validation_table(step)
    table.parent.mkdir(exist_ok=True)
    table.write_text(json.dumps(row) + "\n")
    metrics = {"val/accuracy": accuracy, "val/accuracy_low": accuracy - 0.1, "val/accuracy_high": accuracy + 0.1}
    journal.append("validation", step, metrics=metrics, table=str(table.relative_to(folder.root)), best=True)
