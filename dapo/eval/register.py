"""From a checkpoint folder to a registered version: what it is, made from what, how good, how to load it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.errors import ConfigError
from dapo.eval.evaluate import EvaluationFolder
from dapo.eval.models import digest_of
from dapo.observe import manifest
from dapo.observe.registry import ModelVersion, Registry, logged_model
from dapo.observe.run_folder import REGISTERED, RunFolder
from dapo.observe.shipper import experiment_id, tracking_uri


def register(
    checkpoint: Path, config: RunConfig, name: str = "", evaluation: EvaluationFolder | None = None
) -> ModelVersion:
    """Register a checkpoint of a run by reference; the version that has these weights already, where there is one.

    The model card is the version's description in MLflow, and README.md beside the weights.

    Args:
        checkpoint: `<run>/checkpoints/step-...`.
        config: `mlflow` says where; the run's own configuration is read from its folder.
        name: of the registered model; empty: `mlflow.registered_model`.
        evaluation: of exactly these weights, for the card.

    Raises:
        ConfigError: no name is given or configured.
    """
    name = name or config.mlflow.registered_model or ""
    if not name:
        raise ConfigError("no name to register under: set mlflow.registered_model, for example to dapo-geo3k")
    run = RunFolder(checkpoint.parent.parent)
    registry = Registry(tracking_uri(config), name)
    run_id = str(json.loads(run.mlflow.read_text())["run_id"]) if run.mlflow.exists() else ""
    saved = json.loads((checkpoint / "manifest.json").read_text())
    uri = (checkpoint / "hf").as_uri()
    card = model_card(checkpoint, evaluation)
    (checkpoint / "hf" / "README.md").write_text(card)
    model_id = logged_model(
        registry.client,
        experiment_id(registry.client, config),
        f"{run.id}-step-{saved['step']}",
        uri,
        run_id,
        {"step": str(saved["step"])},
    )
    version = registry.register(model_id, run_id, _tags(run, checkpoint, saved, uri), card)
    (checkpoint / REGISTERED).write_text(json.dumps({"model": name, "version": version.version}))
    return version


def model_card(checkpoint: Path, evaluation: EvaluationFolder | None = None) -> str:
    """Markdown: what, from what, on what data, how good, by which grader, how to load it."""
    run = RunFolder(checkpoint.parent.parent)
    saved = json.loads((checkpoint / "manifest.json").read_text())
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dapo.eval"), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    measured = evaluation.read_metrics() | evaluation.read_inputs() if evaluation else None
    return environment.get_template("model_card.md.j2").render(
        run=run.id,
        step=saved["step"],
        metrics=saved["metrics"],
        config=io.load(run.config),
        made=manifest.read(run),
        evaluation=measured,
        evaluated=io.load(evaluation.config) if evaluation else None,
        digest=digest_of(checkpoint),
    )


def _tags(run: RunFolder, checkpoint: Path, saved: Mapping[str, Any], uri: str) -> dict[str, str]:
    made = manifest.read(run)
    config = io.load(run.config)
    data, code = made.get("data", {}), made.get("code", {})
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    tags = {
        "checkpoint.uri": uri,
        "checkpoint.digest": digest_of(checkpoint),
        "checkpoint.step": str(saved["step"]),
        "dapo.run_id": run.id,
        "config.digest": hashlib.sha256(resolved.encode()).hexdigest()[:16],
        "data.key": Path(data.get("path", "")).name,
        "data.source": json.dumps(data.get("source", {})),
        "code.commit": code.get("commit", ""),
        "code.digest": code.get("digest", ""),
        "code.uncommitted": str(bool(code.get("uncommitted"))),
        "weights.from": str(made.get("weights", {}).get("path", "")),
        "reward.function": config.reward.function,
    }
    scores = {k: v for k, v in saved["metrics"].items() if k in ("val/accuracy", "val/format", "val/length_mean")}
    return tags | {f"metric.{name}": f"{value:.6g}" for name, value in scores.items()}
