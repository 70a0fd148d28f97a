"""Where things lie in a run's folder, and what names the folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo.config.run import RunConfig

# What may change between two starts of one run without making it another run.
_NOT_IDENTITY: dict[str, Any] = {
    "train": {"steps", "epochs", "test_freq", "save_freq", "keep_checkpoints", "mirror", "resume"},
    "ray": True,
    "mlflow": True,
    "run_root": True,
}

REGISTERED = "registered.json"
"""In a checkpoint's folder: the registry refers to it, so it is not removed as an old one."""


def run_id(config: RunConfig) -> str:
    """Name plus 8 hex digits of everything that changes what is learned: the same configuration finds its run again."""
    identity = config.model_dump(mode="json", exclude=_NOT_IDENTITY)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{config.name}-{digest[:8]}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside a run's folder. Each is created by its first writer."""

    root: Path

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        return cls(Path(config.run_root).resolve() / run_id(config))

    @property
    def id(self) -> str:
        return self.root.name

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def inputs(self) -> Path:
        """JSON: {"data": folder of prepared data, "weights": Hugging Face folder}, absolute."""
        return self.root / "inputs.json"

    @property
    def manifest(self) -> Path:
        """JSON: commit, packages, machine, data and weights the run was made from."""
        return self.root / "manifest.json"

    @property
    def mlflow(self) -> Path:
        """JSON: MLflow run id and how far the journal was shipped."""
        return self.root / "mlflow.json"

    @property
    def journal(self) -> Path:
        return self.root / "journal.jsonl"

    @property
    def job_log(self) -> Path:
        return self.root / "job.log"

    @property
    def stop_request(self) -> Path:
        """Exists while the run is asked to stop after saving a checkpoint."""
        return self.root / "stop-request"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Holds state/ (sharded, for resuming), hf/ (Hugging Face layout) and manifest.json, written last."""
        return self.checkpoints / f"step-{step:06d}"

    def validation_table(self, step: int) -> Path:
        """JSON lines: id, question, answer, response, extracted, accuracy, format, tokens, truncated, images
        (base64 PNG), tags."""
        return self.root / "validation" / f"step-{step:06d}.jsonl"

    def validation_results(self, step: int) -> Path:
        """Verdicts on every prompt, as `dapo.eval.results` writes them."""
        return self.root / "validation" / f"step-{step:06d}.results.jsonl"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def report(self) -> Path:
        return self.root / "report.html"
