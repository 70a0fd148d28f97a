"""One evaluation: a model on the held-out prompts of prepared data, in a folder of its own.

Everything that decides the numbers is in the folder's name, so that the same request is measured once. It is measured
in a process of its own (`dapo.runtime.evaluation_job`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.eval import results
from dapo.eval.estimate import accuracy_interval
from dapo.eval.models import Model
from dapo.eval.results import PromptResult
from dapo.observe.manifest import code_digest
from dapo.types import RolloutGroup

MEASURING_CODE = (
    *("algo/batch.py", "data", "eval/estimate.py", "eval/results.py", "model", "serialize.py", "rewards", "rollout"),
    *("runtime/evaluation_job.py", "runtime/generation.py", "runtime/prompts.py", "types.py"),
)
"""What turns weights and prompts into verdicts."""


@dataclass(frozen=True, slots=True)
class EvaluationFolder:
    """Paths inside an evaluation's folder."""

    root: Path

    @property
    def id(self) -> str:
        return self.root.name

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def inputs(self) -> Path:
        """JSON: {"data", "weights"} (folders), "model" (`Model.plain`), "set" (`question_set`)."""
        return self.root / "inputs.json"

    @property
    def answers(self) -> Path:
        """JSON lines: every prompt's responses and verdicts, written while it runs: a killed evaluation goes on."""
        return self.root / "answers.jsonl"

    @property
    def results(self) -> Path:
        """Verdicts by prompt (`dapo.eval.results`)."""
        return self.root / "results.jsonl"

    @property
    def metrics(self) -> Path:
        """JSON: `metrics` (names of docs/metrics.md), `estimates` and `slices` with intervals. Written last."""
        return self.root / "metrics.json"

    @property
    def page(self) -> Path:
        return self.root / "evaluation.html"

    @property
    def progress(self) -> Path:
        """JSON: {"done", "total"} prompts."""
        return self.root / "progress.json"

    @property
    def error(self) -> Path:
        """JSON: {"error" (class), "message"} where it failed."""
        return self.root / "error.json"

    @property
    def log(self) -> Path:
        return self.root / "job.log"

    @property
    def done(self) -> bool:
        return self.metrics.is_file()

    def read_results(self) -> dict[str, PromptResult]:
        return results.from_lines(self.results.read_text(), str(self.results))

    def read_metrics(self) -> dict[str, Any]:
        """What `measure` returned."""
        return dict(json.loads(self.metrics.read_text()))

    def read_inputs(self) -> dict[str, Any]:
        return dict(json.loads(self.inputs.read_text()))


def question_set(config: RunConfig, data: Path) -> str:
    """16 hex digits of prompts and decoding: two models' results with equal ones may be compared prompt by prompt.

    Args:
        config: split, limits, decoding, reward, engine.
        data: prepared folder, named by its content.
    """
    parts = {
        "data": data.name,
        "split": [config.data.validation_split, config.data.instruction, config.data.max_prompt_tokens],
        "decoding": config.validation.model_dump(mode="json", include={"samples", "temperature", "top_p", "top_k"}),
        "prompts": config.validation.max_prompts,
        "tokens": config.batch.max_response_tokens,
        "reward": config.reward.model_dump(mode="json", include={"function", "deadline_s"}),
        "engine": [config.rollout.engine, config.rollout.dtype, config.model.compute_dtype],
        "code": code_digest(MEASURING_CODE, config.reward.function),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def make_folder(config: RunConfig, model: Model, data: Path, weights: Path) -> EvaluationFolder:
    """The folder of this evaluation, with what the process that measures reads. Safe to repeat."""
    asked = question_set(config, data)
    key = hashlib.sha256(f"{model.digest}/{asked}/{config.seed}".encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]", "_", model.name)
    folder = EvaluationFolder(Path(config.run_root).resolve() / "evaluations" / f"{name}-{key}")
    folder.root.mkdir(parents=True, exist_ok=True)
    if not folder.done:
        io.save(config, folder.config)
        inputs = {"data": str(data.resolve()), "weights": str(weights.resolve()), "model": model.plain(), "set": asked}
        folder.inputs.write_text(json.dumps(inputs, indent=1))
    return folder


def measure(groups: Sequence[RolloutGroup], seconds: float) -> dict[str, Any]:
    """Everything `metrics.json` holds.

    Args:
        groups: judged.
        seconds: the evaluation took.
    """
    verdicts = results.of_groups(groups)
    slices = {
        tag: results.numbers(members) | {"interval": _interval(members)}
        for tag, members in results.slices(verdicts).items()
    }
    return {
        "metrics": results.val_metrics(verdicts) | {"time/evaluation": seconds},
        "estimates": {name: asdict(value) for name, value in results.estimates(verdicts).items()},
        "slices": slices,
    }


def _interval(members: Mapping[str, PromptResult]) -> dict[str, float]:
    return asdict(accuracy_interval(list(results.accuracies(members).values())))
