"""Runs side by side: one page, and a summary in Prefect."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from tasks.progress import artifact_key, best_effort
from tasks.retry import may_pass


@task(retries=2, retry_delay_seconds=30, retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False)
def compare(runs: list[str], tracking_uri: str, run_root: str) -> str:
    """Absolute path of the page.

    Args:
        runs: MLflow ids, names or beginnings of names.
        tracking_uri: the MLflow store that knows them all.
        run_root: folder of runs; the page goes into its `comparisons`.
    """
    from dapo.eval.comparison_page import compare_runs

    markdown, path = compare_runs(runs, tracking_uri, run_root)
    get_run_logger().info("comparison: %s", path)
    best_effort(create_markdown_artifact, markdown, key=artifact_key("comparison"))
    best_effort(create_link_artifact, path.as_uri(), link_text="comparison", key=artifact_key("comparison", "page"))
    return str(path)
