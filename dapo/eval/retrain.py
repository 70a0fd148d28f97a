"""When and how a model is trained again: the occasion, the next run's configuration, how both models are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dapo.config import io
from dapo.config.model import FolderModel
from dapo.config.run import RunConfig
from dapo.data.prepare import read_manifest
from dapo.errors import DataError
from dapo.observe.registry import ModelVersion

Split = Literal["validation", "test"]


@dataclass(frozen=True, slots=True)
class Occasion:
    """Whether to train again, and why or why not."""

    train: bool
    reason: str


def occasion(champion: ModelVersion | None, data_key: str, code: str, because: str = "") -> Occasion:
    """Train where it is requested (schedule, person, event), or where data or code changed since the champion.

    Args:
        champion: the model in use.
        data_key: of the data as it is now (`dapo.data.prepare.data_key`).
        code: digest of the training code as it is now (`dapo.observe.manifest.code_digest`).
        because: the reason of the request; empty: not requested.
    """
    if because:
        return Occasion(True, because)
    if champion is None:
        return Occasion(True, "there is no champion yet")
    had_data, had_code = champion.tags.get("data.key", ""), champion.tags.get("code.digest", "")
    if had_data != data_key:
        return Occasion(True, f"data changed: {had_data or 'unknown'} -> {data_key}")
    if had_code != code:
        return Occasion(True, f"training code changed: {had_code or 'unknown'} -> {code}")
    return Occasion(
        False,
        f"neither data ({data_key}) nor training code ({code}) changed since champion version {champion.version} was "
        "trained, and nobody asked; give `because` to train all the same",
    )


def training_config(config: RunConfig, champion: ModelVersion | None, stamp: str) -> RunConfig:
    """The next run: from the champion's weights where there is one, under its own name and seed.

    Args:
        stamp: hex digits of this retraining. It names the run, so that a repeated flow run finds its training again,
            and it is the seed: with the old one an unchanged retraining would repeat the last one to the bit.
    """
    changes: dict[str, Any] = {"name": f"{config.name}-retrain-{stamp}", "seed": int(stamp, 16) % 2**31}
    # Its name is new, so there is no earlier run to replace, except when the flow run is retried.
    changes["train"] = config.train.model_copy(update={"resume": "auto"})
    if champion is not None:
        source = FolderModel(path=str(champion.folder))
        changes["model"] = config.model.model_copy(update={"source": source})
    return config.model_copy(update=changes)


def measuring_config(
    config: RunConfig, split: Split | None = None, overrides: Iterable[str] | Mapping[str, Any] = ()
) -> RunConfig:
    """How champion and challenger are compared; the configured seed, so that both get the same random streams.

    Args:
        split: None: the held-out split that training does not look at. The challenger is the best of many validations
            on the other one: measured there again, its luck would count.
        overrides: dotted keys, for example {"validation.samples": 8}.
    """
    other: Split = "validation" if config.data.validation_split == "test" else "test"
    return io.override(io.override(config, {"data.validation_split": split or other}), overrides)


def require_split(data: Path, split: Split) -> None:
    """Refuse prepared data that lack the split on which champion and challenger are compared; raises DataError."""
    counts = {name: count["rows"] for name, count in read_manifest(data)["splits"].items()}
    if not counts.get(split):
        there = ", ".join(f"{name} ({rows} rows)" for name, rows in counts.items())
        raise DataError(
            f"retrain compares models on the split {split}, in which {data} has no rows; it has {there}. "
            "Add it to the data set, or compare on the split that training validates on (gate_split; by command --gate "
            "data.validation_split=...), though the challenger's luck there counts"
        )
