"""The last stage: one page about the run, in its folder, in Prefect and in MLflow."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from dapo.config.run import RunConfig
from dapo.observe.run_folder import RunFolder
from tasks.progress import StageProgress, artifact_key, best_effort, notify


@task(cache_policy=NO_CACHE, persist_result=False)
def report(config: RunConfig) -> str:
    """Absolute path of the page. Safe to repeat."""
    from dapo.observe.journal import read
    from dapo.observe.mlflow_page import page as mlflow_page
    from dapo.observe.report import headline, summary, write_plots, write_report
    from dapo.observe.shipper import log_artifacts

    folder = RunFolder.of(config)
    notify(StageProgress("report", "running"))
    page = write_report(folder)
    lines = [f"| {label} | {value} |" for value, label in headline(summary(list(read(folder.journal))))]
    if address := mlflow_page(folder):
        lines.append(f"| MLflow | [{folder.id}]({address}) |")
    best_effort(
        create_markdown_artifact,
        "\n".join([f"# {folder.id}", "", "| | |", "|---|---|", *lines]),
        key=artifact_key("summary", folder.id),
    )
    best_effort(create_link_artifact, page.as_uri(), link_text="report", key=artifact_key("report", folder.id))
    try:
        log_artifacts(folder, config, [page])
        log_artifacts(folder, config, write_plots(folder), under="plots")
    except Exception as error:
        # MLflow's client raises its own, requests', SQLAlchemy's and OS errors; the page is on disk whatever it says.
        get_run_logger().warning("MLflow did not take the report: %s: %s", type(error).__name__, error)
    notify(StageProgress("report", "done", detail=str(page)))
    return str(page)
