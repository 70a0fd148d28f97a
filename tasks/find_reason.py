"""The first stage of a retraining: is there a reason?"""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from dapo.config.run import RunConfig
from tasks.retry import may_pass


@task(retries=2, retry_delay_seconds=30, retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False)
def find_reason(config: RunConfig, because: str) -> tuple[bool, str, int | None]:
    """Whether to train, why (not), and the champion's version (None: there is none).

    Args:
        config: of the training; `mlflow.registered_model` names the model.
        because: the reason of whoever asks; empty: only changed data or code is one.
    """
    from dapo.data.prepare import data_key
    from dapo.eval.retrain import occasion
    from dapo.observe.manifest import code_digest
    from dapo.observe.registry import CHAMPION, Registry
    from dapo.observe.shipper import tracking_uri

    champion = Registry(tracking_uri(config), config.mlflow.registered_model or "").get(CHAMPION)
    data, code = data_key(config.data, Path(config.data.cache_dir)), code_digest(reward=config.reward.function)
    found = occasion(champion, data, code, because)
    get_run_logger().info("%s: %s", "training" if found.train else "nothing to do", found.reason)
    return found.train, found.reason, champion.version if champion else None
