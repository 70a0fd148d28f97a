"""The weights stage: a Hugging Face folder in the cache, fetched, verified, or made on the spot (tiny)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task

from dapo.config.model import ModelSource
from tasks import inputs
from tasks.cached import place_key
from tasks.progress import ProgressBar


def _key(context: object, parameters: Mapping[str, Any]) -> str:
    source, cache = parameters["source"], parameters["cache_dir"]
    if source.kind == "tiny":
        from dapo.data.tiny import tiny_key

        return place_key("fetch_weights", tiny_key(source), cache)
    from dapo.data.fetch import weights_key

    return place_key("fetch_weights", weights_key(source, Path(cache)), cache)


@task(task_run_name="fetch_weights-{source.kind}", cache_key_fn=_key, persist_result=True)
def fetch_weights(source: ModelSource, cache_dir: str) -> str:
    """Absolute path of a folder in Hugging Face layout."""
    bar = ProgressBar("fetch_weights", f"{source.kind} weights")
    path = inputs.begin("weights", source, Path(cache_dir)).wait(bar)
    bar.close(str(path))
    return str(path)
