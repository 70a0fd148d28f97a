"""Evaluations and promotion decisions in MLflow, where other machines and later comparisons find them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.eval.evaluate import EvaluationFolder
from dapo.files import write_whole
from dapo.observe.registry import ModelVersion, Registry
from dapo.observe.shipper import connect, experiment_id, tracking_uri

KIND, EVALUATION = "dapo.kind", "evaluation"
SET, MODEL_DIGEST, SOURCE_RUN = "dapo.question_set", "checkpoint.digest", "dapo.source_run"

_WORDS = {True: "promoted", False: "refused", None: "awaits approval"}


def log_evaluation(folder: EvaluationFolder, config: RunConfig) -> str:
    """A finished evaluation as an MLflow run of its own; id of the one that is there already, where there is one.

    The run holds metrics, verdicts by prompt, the page and the configuration. Its tags say which model, which training
    run that came from, and which questions were asked.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    client = connect(tracking_uri(config))
    experiment = experiment_id(client, config)
    inputs, measured = folder.read_inputs(), folder.read_metrics()
    model, asked = inputs["model"], io.load(folder.config)
    found = client.search_runs([experiment], f"tags.`dapo.evaluation` = '{folder.id}'")
    if found and found[0].info.status == "FINISHED":
        return str(found[0].info.run_id)
    tags = {
        KIND: EVALUATION,
        "dapo.evaluation": folder.id,
        "dapo.model": model["reference"],
        SET: inputs["set"],
        MODEL_DIGEST: model["digest"],
        SOURCE_RUN: model["run_id"],
    }
    # One that was killed while it was written is completed; MLflow takes the same point twice as one.
    run = found[0] if found else client.create_run(experiment, run_name=f"evaluate {model['name']}", tags=tags)
    run_id = str(run.info.run_id)
    params = {
        "model": model["reference"],
        "split": asked.data.validation_split,
        "samples": asked.validation.samples,
        "temperature": asked.validation.temperature,
        "top_p": asked.validation.top_p,
        "grader": asked.reward.function,
    }
    at = int(folder.metrics.stat().st_mtime * 1000)
    points = [
        Metric(name, float(value), at, 0, model_id=model["model_id"] or None, run_id=run_id)
        for name, value in measured["metrics"].items()
        if not math.isnan(value)
    ]
    client.log_batch(run_id, metrics=points, params=[Param(k, str(v)) for k, v in params.items()])
    data = Path(inputs["data"])
    dataset = Dataset(name=data.name, digest=data.name[:36], source_type="local", source=json.dumps({"uri": str(data)}))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])
    for path in (folder.config, folder.results, folder.metrics, folder.page):
        client.log_artifact(run_id, str(path))
    client.set_terminated(run_id)
    return run_id


def record_decision(
    registry: Registry, challenger: ModelVersion, champion: ModelVersion | None, decision: Mapping[str, Any], root: Path
) -> Path:
    """Record the decision and its reasons, promoted or not: a file, the version's tags, an artifact of its run.

    Args:
        decision: `Decision.plain()` and whatever else belongs to it; `promote` (None: a person is asked), `reasons` and
            `difference` at least.
        root: the folder of runs.

    Returns:
        The file, `<root>/decisions/<name>-v<version>.json`.
    """
    content = {
        "model": registry.name,
        "versions": {"champion": champion.version if champion else None, "challenger": challenger.version},
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **decision,
    }
    path = root / "decisions" / f"{registry.name}-v{challenger.version}.json"
    write_whole(path, json.dumps(content, indent=1))
    difference = decision["difference"]
    registry.tag(
        challenger,
        {
            "gate.decision": _WORDS[decision["promote"]],
            "gate.reasons": "; ".join(decision["reasons"])[:4000],
            "gate.difference": "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**difference),
            "gate.against": str(champion.version) if champion else "base",
        },
    )
    if challenger.run_id:
        registry.client.log_artifact(challenger.run_id, str(path), "decisions")
    return path
