"""The evaluation stage: one model on held-out prompts, in a process or Ray job of its own."""

from __future__ import annotations

import logging
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.runtime import flow_run

from dapo.config.run import RunConfig
from tasks.progress import ProgressBar, artifact_key, best_effort


@task(task_run_name="evaluate-{label}", cache_policy=NO_CACHE, persist_result=False)
def evaluate(config: RunConfig, reference: str, data: str, label: str) -> str:
    """Folder of the evaluation; measured before, it is found again.

    Args:
        config: split, decoding, grader, engine; `mlflow` says where it is recorded.
        reference: which model (`dapo.eval.models.FORMS`).
        data: folder of prepared data.
        label: names the task run.
    """
    from dapo.eval.models import find_model
    from tasks.measure import measure

    log = get_run_logger()
    model = find_model(reference, config)
    bar = ProgressBar("evaluate", model.name)
    found = measure(config, model, Path(data), lambda _: bar, owner=flow_run.id or "")
    folder, measured = found.folder, found.numbers
    if found.before:
        log.info("skipped: the same weights answered the same questions before, in %s", folder.root)
    accuracy = measured["metrics"]["val/accuracy"]
    log.info("%s: accuracy %.4f on %d prompts", reference, accuracy, measured["metrics"]["val/prompts"])
    rows = [f"| {n} | {e['value']:.4f} | {e['low']:.4f} to {e['high']:.4f} |" for n, e in measured["estimates"].items()]
    rows += [f"| {n} | {v:.4g} | |" for n, v in measured["metrics"].items() if "slice/" not in n]
    table = "\n".join([f"# {reference}", "", "| measure | value | 95 % interval |", "|---|---|---|", *rows])
    best_effort(create_markdown_artifact, table, key=artifact_key("evaluation", model.name))
    best_effort(
        create_link_artifact, folder.page.as_uri(), link_text="answers", key=artifact_key("answers", model.name)
    )
    resource = {"prefect.resource.id": f"dapo.model.{model.name}", "prefect.resource.name": model.name}
    payload = {"evaluation": folder.id, "accuracy": accuracy, "reference": reference}
    best_effort(emit_event, "dapo.evaluation.completed", resource=resource, payload=payload)
    log.log(logging.INFO if found.mlflow_run else logging.WARNING, "MLflow: %s", found.record)
    bar.close(f"accuracy {accuracy:.3f}")
    return str(folder.root)
