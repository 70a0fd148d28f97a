"""Names of flow runs: model, data and date, so that a list of them can be read."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from dapo.config.data import DataSource
from dapo.config.model import ModelSource
from dapo.errors import DapoError
from flows.parameters import configured


def of_training(parameters: Mapping[str, Any], why: str = "") -> str:
    """Model it starts from, configuration, data, reason, time.

    Args:
        parameters: of the flow run, as Prefect keeps them.
        why: the reason of a retraining.
    """
    try:
        config = configured(dict(parameters))
    except DapoError:
        return _dated("not-valid")
    return _dated(_source(config.model.source), config.name, _source(config.data.source), why)


def of_evaluation(parameters: Mapping[str, Any]) -> str:
    """Model that is measured, data, split, time; parameters as above."""
    try:
        config = configured(dict(parameters))
    except DapoError:
        return _dated("not-valid")
    asked, folder = str(parameters.get("model", "base")), parameters.get("data")
    model = _source(config.model.source) if asked == "base" else _model(asked)
    data = PurePosixPath(folder).name if folder else _source(config.data.source)
    return _dated(model, data, config.data.validation_split)


def _dated(*words: str) -> str:
    return "-".join([*filter(None, words), f"{datetime.now():%Y-%m-%d-%H%M%S}"])


def _source(source: ModelSource | DataSource) -> str:
    """The last part of a repository's or folder's name."""
    if source.kind == "hub":
        return PurePosixPath(source.repo).name
    return PurePosixPath(source.path).name if source.kind == "folder" else source.kind


def _model(reference: str) -> str:
    """`dapo-geo3k@champion` of models:/dapo-geo3k@champion, `RUN-step-000060` of a checkpoint, NAME of OWNER/NAME."""
    if reference.startswith("models:/"):
        return reference.removeprefix("models:/").replace("/", "-")
    parts = [part for part in PurePosixPath(reference).parts if part not in ("hf", "checkpoints")] or [reference]
    return "-".join(parts[-2:] if parts[-1].startswith("step-") else parts[-1:])
