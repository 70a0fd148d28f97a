"""The prompts a job works on: splits of prepared data, measured by the model's processor."""

from __future__ import annotations

import logging
from pathlib import Path

from dapo.config.run import RunConfig
from dapo.data.dataset import load_prompts
from dapo.data.processor import PromptProcessor
from dapo.errors import DataError
from dapo.types import Prompt

log = logging.getLogger("dapo.prompts")


def training(config: RunConfig, data: Path, processor: PromptProcessor) -> list[Prompt]:
    """Every prompt of the training split that fits; raises what `held_out` does."""
    return _split(config, data, processor, "train", None)


def held_out(config: RunConfig, data: Path, processor: PromptProcessor) -> list[Prompt]:
    """The first `validation.max_prompts` of `data.validation_split` that fit.

    Raises:
        DataError: the data has no such split, or none of its prompts fits.
    """
    return _split(config, data, processor, config.data.validation_split, config.validation.max_prompts)


def _split(config: RunConfig, data: Path, processor: PromptProcessor, name: str, most: int | None) -> list[Prompt]:
    limit = config.data.max_prompt_tokens
    found = load_prompts(
        data / f"{name}.parquet",
        processor,
        instruction=config.data.instruction,
        limit=limit,
        too_long=config.data.too_long,
        max_prompts=most,
    )
    log.info("%s: %d prompts, %d dropped (longer than %d tokens)", name, len(found.prompts), len(found.dropped), limit)
    if not found.prompts:
        raise DataError(f"split {name} of {data} has no prompt of at most data.max_prompt_tokens={limit} tokens")
    return list(found.prompts)
