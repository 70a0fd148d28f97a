"""The data stage: the configured source as parquet in the cache, named by content and code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task

from dapo.config.data import DataConfig
from tasks import inputs
from tasks.cached import place_key
from tasks.progress import ProgressBar


def _key(context: object, parameters: Mapping[str, Any]) -> str:
    from dapo.data.prepare import data_key

    data = parameters["data"]
    return place_key("prepare_dataset", data_key(data), data.cache_dir)


@task(task_run_name="prepare_dataset-{data.source.kind}", cache_key_fn=_key, persist_result=True)
def prepare_dataset(data: DataConfig) -> str:
    """Absolute path of the folder with one parquet file per split."""
    bar = ProgressBar("prepare_dataset", f"{data.source.kind} data")
    path = inputs.begin("data", data, Path(data.cache_dir)).wait(bar)
    bar.close(str(path))
    return str(path)
