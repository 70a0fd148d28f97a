"""Prepared rows to prompts: encoded and measured with the model's own processor before training starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dapo.data.images import IMAGE_MARKER
from dapo.data.processor import Encoded, PromptProcessor
from dapo.errors import DataError
from dapo.types import Prompt

log = logging.getLogger(__name__)

_COLUMNS = ("data_source", "images", "extra_info", "tags")
_ROWS_AT_ONCE = 256
_NAMED = 10


@dataclass(frozen=True, slots=True)
class Dropped:
    """A prompt that is not used."""

    id: str
    tokens: int
    """Its length, above the limit."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a split that fit, in the file's order, and those that do not."""

    prompts: tuple[Prompt, ...]
    dropped: tuple[Dropped, ...]


def load_prompts(
    parquet: Path,
    processor: PromptProcessor,
    *,
    instruction: str,
    limit: int,
    too_long: Literal["drop", "refuse"],
    max_prompts: int | None = None,
) -> PromptSet:
    """Read a prepared file; every prompt is whole, none is ever cut.

    Args:
        parquet: a split of a prepared folder.
        instruction: appended to every question.
        limit: most tokens of a prompt, image placeholders included.
        too_long: what happens above it: dropped and listed, or refused.
        max_prompts: stop after so many prompts that fit.

    Raises:
        DataError: the file is not a prepared one, a row does not suit the model, or (with `refuse`) prompts are too
            long; the message has their ids and lengths.
    """
    prompts: list[Prompt] = []
    dropped: list[Dropped] = []
    for rows in _batches(parquet):
        for row, encoded in zip(rows, _encode(rows, processor, instruction), strict=True):
            prompt = _prompt(row, encoded)
            if len(prompt.token_ids) > limit:
                dropped.append(Dropped(prompt.id, len(prompt.token_ids)))
            else:
                prompts.append(prompt)
            if len(prompts) == max_prompts:
                break
        if len(prompts) == max_prompts:
            break
    if dropped:
        found = (
            f"{parquet}: {len(dropped)} of {len(dropped) + len(prompts)} prompts are longer than "
            f"data.max_prompt_tokens={limit}: {_named(dropped)}"
        )
        if too_long == "refuse":
            raise DataError(f"{found}; raise the limit, or leave them out with data.too_long=drop")
        log.warning("%s; they are left out", found)
    return PromptSet(tuple(prompts), tuple(dropped))


def _named(dropped: list[Dropped]) -> str:
    """The longest, with their lengths."""
    longest = sorted(dropped, key=lambda d: (-d.tokens, d.id))[:_NAMED]
    more = f" and {len(dropped) - _NAMED} more" if len(dropped) > _NAMED else ""
    return ", ".join(f"{d.id} ({d.tokens} tokens)" for d in longest) + more


def _batches(parquet: Path) -> Iterator[list[dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(parquet) as file:
            missing = [column for column in _COLUMNS if column not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{parquet} has no column {' and '.join(missing)}: it is not a prepared file")
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=list(_COLUMNS)):
                yield batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{parquet} cannot be read: {error}") from None


def _encode(rows: list[dict[str, Any]], processor: PromptProcessor, instruction: str) -> list[Encoded]:
    items = [(_question(row), _images(row)) for row in rows]
    try:
        return processor.encode_many(items, instruction)
    except DataError:
        for row, (question, images) in zip(rows, items, strict=True):
            try:
                processor.encode(question, images, instruction)
            except DataError as error:
                raise DataError(f"{_id(row)}: {error}") from None
        raise


def _prompt(row: dict[str, Any], encoded: Encoded) -> Prompt:
    return Prompt(
        id=_id(row),
        token_ids=encoded.token_ids,
        images=_images(row),
        image_grids=encoded.grids,
        answer=row["extra_info"]["answer"],
        question=_question(row).replace(IMAGE_MARKER, "").strip(),
        data_source=row["data_source"],
        tags=tuple(row["tags"]),
    )


def _id(row: dict[str, Any]) -> str:
    return f"{row['extra_info']['split']}/{row['extra_info']['index']}"


def _question(row: dict[str, Any]) -> str:
    return str(row["extra_info"]["question"])


def _images(row: dict[str, Any]) -> tuple[bytes, ...]:
    return tuple(image["bytes"] for image in row["images"])
