"""Data, reward and validation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dapo.config.base import Frozen

Count = Annotated[int, Field(ge=1)]


class HubData(Frozen):
    """A data set repository on a Hugging Face hub with columns images, problem, answer."""

    kind: Literal["hub"] = "hub"
    repo: str = "hiyouga/geometry3k"
    revision: str = "main"
    """Branch, tag or commit; the commit it resolves to is recorded with the prepared data."""
    endpoint: str | None = None


class FolderData(Frozen):
    """A folder in the hub's layout (parquet files named by split)."""

    kind: Literal["folder"] = "folder"
    path: str
    """Local, or a URL that fsspec knows (s3://bucket/folder): downloaded once into the cache."""


class SyntheticData(Frozen):
    """Synthetic figures, with the hub's columns; the question cannot be answered without the image."""

    kind: Literal["synthetic"] = "synthetic"
    train: Count = 4096
    validation: Count = 256
    test: Count = 256
    seed: int = 0


DataSource = Annotated[HubData | FolderData | SyntheticData, Field(discriminator="kind")]


class DataConfig(Frozen):
    """Source and preparation of prompts."""

    source: DataSource = SyntheticData()
    instruction: str = (
        "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
        "The reasoning process MUST BE enclosed within <think> </think> tags. "
        "The final answer MUST BE put in \\boxed{}."
    )
    """Appended to every question. Empty: nothing is appended."""
    max_prompt_tokens: Count = 1024
    """Measured with the model's own processor, image placeholders included."""
    too_long: Literal["drop", "refuse"] = "drop"
    """Prompts above the limit: drop them (counted) or refuse to start. Nothing is ever cut inside an image."""
    max_broken_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of rows that may be quarantined before preparation fails."""
    validation_split: Literal["validation", "test"] = "test"
    cache_dir: str = "cache"
    """Prepared data and fetched weights, shared by all runs."""


class RewardConfig(Frozen):
    """How answers are graded. reward = accuracy_weight * accuracy + format_weight * format + overlong."""

    function: str = "dapo.rewards.geometry3k:grade"
    """`module:name` of a function (response, answer) -> Scored or number, or of a class whose instances are one."""
    accuracy_weight: Annotated[float, Field(ge=0)] = 0.9
    format_weight: Annotated[float, Field(ge=0)] = 0.1
    deadline_s: Annotated[float, Field(gt=0)] = 5.0
    """A check that takes longer is killed and counted as TimedOut, never as a zero."""
    workers: Count = 1
    max_failed_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Above this share of failed checks in a generation round the run stops: the reward function is broken."""


class ValidationConfig(Frozen):
    """How the policy is measured on held-out prompts."""

    before_training: bool = True
    samples: Count = 1
    """Responses per prompt."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.7
    top_k: int = -1
    max_prompts: Count | None = None
    """Only the first so many prompts of the split; null: all."""
    table_rows: Annotated[int, Field(ge=0)] = 16
    """Answers with images kept for the report and MLflow."""
