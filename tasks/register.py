"""A checkpoint becomes a registered version and the challenger."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from dapo.config.run import RunConfig
from tasks.retry import may_pass


@task(retries=3, retry_delay_seconds=30, retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False)
def register(config: RunConfig, checkpoint: str, evaluation: str) -> int:
    """Its version; registering the same weights again finds it.

    Args:
        config: `mlflow` says where and under which name.
        checkpoint: folder `<run>/checkpoints/step-...`.
        evaluation: folder of an evaluation of these weights.
    """
    from dapo.eval.evaluate import EvaluationFolder
    from dapo.eval.register import register as by_reference
    from dapo.observe.registry import Registry
    from dapo.observe.shipper import tracking_uri

    version = by_reference(Path(checkpoint), config, evaluation=EvaluationFolder(Path(evaluation)))
    Registry(tracking_uri(config), version.name).challenge(version)
    get_run_logger().info("%s is the challenger: %s", version.reference, version.tags["checkpoint.uri"])
    return version.version
