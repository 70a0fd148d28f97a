"""Runs as recorded in MLflow: everything a comparison needs, also of runs on machines that are gone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dapo.errors import ConfigError
from dapo.eval import results
from dapo.eval.artifacts import Artifacts
from dapo.eval.mlflow_records import EVALUATION, KIND, SET, SOURCE_RUN
from dapo.eval.results import PromptResult

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

HISTORIES = (
    "val/accuracy",
    "val/accuracy_low",
    "val/accuracy_high",
    "val/format",
    "val/length_mean",
    "val/truncated",
    "groups/accuracy",
    "groups/keep_rate",
    "groups/responses_total",
    "reward/mean",
    "response/length_mean",
    "train/entropy",
    "train/grad_norm",
    "engine/gap_mean",
    "time/step",
)
"""Metrics whose course is read; of all others only the last value."""

# The parts of a configuration that decide what validation asks and how.
_ASKED = (
    "data.validation_split",
    "data.instruction",
    "data.max_prompt_tokens",
    "validation.samples",
    "validation.temperature",
    "validation.top_p",
    "validation.top_k",
    "validation.max_prompts",
    "batch.max_response_tokens",
    "reward.function",
)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """One measuring of a run's model, prompt by prompt."""

    where: str
    """For people: which evaluation or validation."""
    asked: str
    """Equal where prompts, decoding and grader are: then two may be paired."""
    by_prompt: Mapping[str, PromptResult]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run."""

    id: str
    """MLflow's."""
    name: str
    status: str
    config: Mapping[str, str]
    """Dotted key to value."""
    code: Mapping[str, str]
    """commit, digest, reward (digest of a user's), uncommitted (digest of the difference)."""
    packages: Mapping[str, str]
    data: Mapping[str, str]
    """name and digest of the data set."""
    devices: int
    metrics: Mapping[str, float]
    """Last values."""
    history: Mapping[str, Sequence[tuple[int, float]]]
    """(step, value), by step."""
    verdicts: tuple[Verdicts, ...]


def store(tracking_uri: str | None, run_root: str) -> str:
    """The MLflow store as given, else MLFLOW_TRACKING_URI, else SQLite in the folder of runs; raises ConfigError."""
    if uri := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    local = Path(run_root).resolve() / "mlflow.db"
    if not local.is_file():
        raise ConfigError(f"no MLflow store {local}; name one, or the folder of the runs that has it")
    return f"sqlite:///{local}"


def read_runs(client: MlflowClient, references: Sequence[str]) -> list[RunRecord]:
    """The runs meant, in the order given.

    Args:
        references: MLflow run ids, run names, or beginnings of names.

    Raises:
        ConfigError: one means no run, or several.
    """
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = [_find(client, experiments, reference) for reference in references]
    names = [str(run.info.run_name) for run in found]
    return [
        _read(client, experiments, run, name if names.count(name) == 1 else f"{name} ({run.info.run_id[:6]})")
        for run, name in zip(found, names, strict=True)
    ]


def _find(client: MlflowClient, experiments: list[str], reference: str) -> Run:
    if re.fullmatch("[0-9a-f]{32}", reference):
        by_id = client.search_runs(experiments, f"attributes.run_id = '{reference}'")
        if by_id:
            return by_id[0]
    text = reference.replace("'", "")
    matching = client.search_runs(experiments, f"attributes.run_name LIKE '{text}%'", max_results=50)
    exact = [run for run in matching if run.info.run_name == reference]
    # A training's evaluations have names of their own; its name alone means the training.
    chosen = exact or [run for run in matching if run.data.tags.get(KIND) != EVALUATION] or matching
    if len(chosen) == 1:
        return chosen[0]
    listed = matching or client.search_runs(experiments, max_results=20)
    names = ", ".join(f"{run.info.run_name} ({run.info.run_id})" for run in listed) or "none"
    what = "means several runs; give an id" if matching else "is no run in this MLflow store"
    raise ConfigError(f"{reference!r} {what}; there are: {names}")


def _read(client: MlflowClient, experiments: list[str], run: Run, name: str) -> RunRecord:
    run_id = str(run.info.run_id)
    artifacts = Artifacts(client, run)
    config = _flat(yaml.safe_load(artifacts.text("config.yaml") or "{}")) or dict(run.data.params)
    made = json.loads(artifacts.text("manifest.json") or "{}")
    code = dict(made.get("code", {}))
    if changes := code.get("uncommitted"):
        code["uncommitted"] = hashlib.sha256(changes.encode()).hexdigest()[:12]
    inputs = [one.dataset for one in (run.inputs.dataset_inputs if run.inputs else ())]
    grader = str(code.get("reward", ""))
    history = {n: _history(client, run_id, n) for n in HISTORIES if n in run.data.metrics}
    return RunRecord(
        id=run_id,
        name=name,
        status=str(run.info.status),
        config=config,
        code=code,
        packages=dict(made.get("packages", {})),
        data={"name": inputs[0].name, "digest": inputs[0].digest} if inputs else {},
        devices=int(config.get("model.parallel.world_size") or 1) + int(config.get("rollout.devices") or 0),
        metrics=dict(run.data.metrics),
        history=history,
        verdicts=tuple(_verdicts(client, experiments, run, config, (inputs[0].digest if inputs else "", grader))),
    )


def _verdicts(
    client: MlflowClient, experiments: list[str], run: Run, config: Mapping[str, str], digests: tuple[str, str]
) -> list[Verdicts]:
    """Evaluations of the run's checkpoints (or the run itself, where it is one), newest first; then validations.

    Args:
        digests: of the data, and of the user's reward.
    """
    run_id = str(run.info.run_id)
    found = []
    if run.data.tags.get(KIND) == EVALUATION:
        evaluations = [run]
    else:
        clauses = f"tags.`{KIND}` = '{EVALUATION}' AND tags.`{SOURCE_RUN}` = '{run_id}'"
        evaluations = list(client.search_runs(experiments, clauses, order_by=["attributes.start_time DESC"]))
    for evaluation in evaluations:
        if text := Artifacts(client, evaluation).text("results.jsonl"):
            where = str(evaluation.info.run_name)
            found.append(Verdicts(where, evaluation.data.tags[SET], results.from_lines(text, where)))
    artifacts = Artifacts(client, run)
    paths = [path for path in artifacts.paths("validation") if path.endswith(".results.jsonl")]
    if paths and (text := artifacts.text(max(paths))):
        where = f"last validation ({Path(max(paths)).name.removesuffix('.results.jsonl')})"
        asked = json.dumps([*digests, *(config.get(key) for key in _ASKED)])
        found.append(Verdicts(where, f"validation {asked}", results.from_lines(text, where)))
    return found


def _history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """One point per step: of a step that was logged twice the later one."""
    points = sorted(client.get_metric_history(run_id, name), key=lambda m: (m.step, m.timestamp))
    return sorted({m.step: float(m.value) for m in points}.items())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = str(value)
    return out
