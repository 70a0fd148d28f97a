"""Runs and checkpoints that are logged to MLflow."""

from __future__ import annotations

import shutil
from pathlib import Path

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.eval import results
from dapo.observe import manifest
from dapo.observe.journal import Journal
from dapo.observe.run_folder import RunFolder
from dapo.observe.shipper import Shipper
from dapo.runtime import checkpoints
from tests.eval.verdicts import many


def make_run(
    root: Path, name: str, *, steps: int, gain: float, seconds: float, responses: int, right: int, **tree: object
) -> tuple[RunConfig, str]:
    """A run whose validation accuracy rises by `gain` a step from 0.5, in MLflow and nowhere else."""
    config = io.validate({"name": name, "run_root": str(root / "runs"), **tree})
    folder = RunFolder.of(config)
    folder.root.mkdir(parents=True)
    io.save(config, folder.config)
    manifest.write(folder, root, root)
    journal = Journal(folder.journal)
    journal.append("started", 0, run_id=folder.id, attempt=1, total_steps=steps, derived={})
    for step in range(steps + 1):
        if step:
            metrics = {"time/step": seconds, "groups/responses_total": responses * step, "train/entropy": 1 / step}
            journal.append("step", step, metrics=metrics, seconds_left=0.0)
        table = folder.validation_table(step)
        table.parent.mkdir(exist_ok=True)
        table.write_text("")
        folder.validation_results(step).write_text(results.to_lines(many(100, right)))
        accuracy = {"val/accuracy": 0.5 + gain * step, "val/slice/half:even/accuracy": 0.5}
        journal.append("validation", step, metrics=accuracy, table=str(table.relative_to(folder.root)), best=True)
    journal.append("ended", steps, status="finished", reason="done")
    shipper = Shipper(folder, config)
    shipper.ship()
    shutil.rmtree(folder.root)
    return config, str(shipper.run_id)


def save_checkpoint(folder: RunFolder, step: int, accuracy: float, weights: str) -> Path:
    """A checkpoint as the job writes it, with a word for weights."""
    path = checkpoints.begin(folder, step)
    (path / "hf").mkdir()
    (path / "hf" / "config.json").write_text("{}")
    (path / "hf" / "model.safetensors").write_text(weights)
    return checkpoints.seal(folder, step, "{}", {"val/accuracy": accuracy})
