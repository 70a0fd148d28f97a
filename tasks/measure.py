"""One evaluation from its model to its record in MLflow; shared by the task `evaluate` and `dapo evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo.config.run import RunConfig
from dapo.data.storage import Progress
from dapo.eval.evaluate import EvaluationFolder, make_folder
from dapo.eval.mlflow_records import log_evaluation
from dapo.eval.models import Model
from dapo.runtime.evaluation import evaluate
from tasks import inputs


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured, and where it is."""

    folder: EvaluationFolder
    numbers: dict[str, Any]
    """What metrics.json holds: `metrics`, `estimates`, `slices`."""
    before: bool
    """The same weights answered the same questions before."""
    mlflow_run: str | None
    problem: str = ""
    """Why MLflow has no run of it."""

    @property
    def record(self) -> str:
        return f"run {self.mlflow_run}" if self.mlflow_run else self.problem


def measure(
    config: RunConfig, model: Model, data: Path | None, progress: Callable[[str], Progress], owner: str = ""
) -> Measured:
    """Fetch the weights, measure them (once), and log to MLflow; its outage costs no evaluation.

    Args:
        config: split, decoding, grader, engine; `mlflow` says where it is recorded.
        model: as `dapo.eval.models.find_model` found it.
        data: folder of prepared data; None: the configured source is prepared while the weights are fetched.
        progress: called for "weights", "data" and "prompts".
        owner: whose evaluation it is, for `dapo.runtime.evaluation.stop_jobs`.

    Raises:
        DapoError: data or weights cannot be had, or what stopped the measuring.
    """
    cache = Path(config.data.cache_dir)
    preparing = inputs.begin("data", config.data, cache) if data is None else None
    weights = inputs.begin("weights", model.source, cache).wait(progress("weights"))
    prepared = preparing.wait(progress("data")) if preparing else data
    assert prepared is not None, "given, or prepared"
    folder = make_folder(config, model, prepared, weights)
    before = folder.done
    numbers = evaluate(folder, progress("prompts"), owner)
    try:
        return Measured(folder, numbers, before, log_evaluation(folder, config))
    except Exception as error:
        # MLflow's client raises its own, requests', SQLAlchemy's and OS errors; the numbers are on disk all the same.
        problem = f"did not take the evaluation ({type(error).__name__}: {error}); evaluate again to send it"
        return Measured(folder, numbers, before, None, problem)
