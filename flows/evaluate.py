"""The flow `evaluate`: any model on any prepared data, without training.

dapo evaluate models:/dapo-geo3k@champion configs/geo3k.yaml      here and now
prefect deployment run evaluate/geo3k -p model=OWNER/NAME         by a Prefect worker
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled

from dapo.config.run import RunConfig
from flows import names
from flows.cancellation import stop_evaluation
from flows.parameters import DEFAULT_PATH, Overrides, resolve
from flows.recovery import begin, come_back
from tasks import inputs
from tasks.cached import CachedStage
from tasks.evaluate import evaluate as evaluate_model
from tasks.prepare_dataset import prepare_dataset
from tasks.watch import cancelled, interrupted_when_cancelled


def run_name() -> str:
    return names.of_evaluation(flow_run.parameters)


@flow(
    name="evaluate",
    flow_run_name=run_name,
    persist_result=False,
    on_cancellation=[stop_evaluation],
    on_crashed=[come_back],
)
def evaluate(
    model: str = "base",
    config_path: str = DEFAULT_PATH,
    overrides: Overrides = None,
    config: RunConfig | None = None,
    data: str | None = None,
) -> Any:
    """Measure a model on held-out prompts: mean@k, pass@k, maj@k with intervals, slices, a page of answers.

    Args:
        model: a checkpoint, run or Hugging Face folder, models:/NAME@ALIAS or models:/NAME/VERSION, a hub repository
            OWNER/NAME[@REVISION], or `base` for the weights the configuration starts from.
        config_path: YAML file, relative to the worker's working directory: data, decoding, grader, engine.
        overrides: dotted keys on top of the file, for example {"validation.samples": 32}.
        config: a whole configuration instead of the file; the overrides apply to it too.
        data: folder of prepared data; without it the configured source is prepared.

    Returns:
        The evaluation's folder.
    """
    run = resolve(config_path, overrides, config)
    begin()
    try:
        with interrupted_when_cancelled():
            prepared = data or CachedStage(prepare_dataset, run.data).result()
            return evaluate_model(run, model, prepared, Path(model).name)
    except TerminationSignal:
        if not cancelled():
            raise
        return Cancelled(message="cancelled while it measured; retry this flow run to go on")
    finally:
        inputs.abort_all()
