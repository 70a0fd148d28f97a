"""The model: source, precision, parallelism, optimiser."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dapo.config.base import Frozen

Count = Annotated[int, Field(ge=1)]


class HubModel(Frozen):
    """Weights from a Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    repo: str
    revision: str = "main"
    """Branch, tag or commit; the commit it resolves to is recorded with the run."""
    endpoint: str | None = None
    """Another hub than huggingface.co (a mirror)."""


class FolderModel(Frozen):
    """Weights from a folder in Hugging Face layout."""

    kind: Literal["folder"] = "folder"
    path: str
    """Local, or a URL that fsspec knows (s3://bucket/folder): downloaded once into the cache."""


class TinyModel(Frozen):
    """A small real Qwen3-VL, randomly initialised and warmed up on the synthetic task. The CPU default."""

    kind: Literal["tiny"] = "tiny"
    architecture: Literal["dense", "moe"] = "dense"
    warmup_steps: Annotated[int, Field(ge=0)] = 300
    """Supervised steps before reinforcement learning starts."""
    warmup_batch: Count = 64
    """Demonstrations per supervised step."""
    warmup_lr: Annotated[float, Field(gt=0)] = 2e-3
    wrong_share: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Share of demonstrations that use a formula chosen regardless of the figure: what there is to learn."""
    seed: int = 0


ModelSource = Annotated[HubModel | FolderModel | TinyModel, Field(discriminator="kind")]


class ParallelConfig(Frozen):
    """How training is distributed over devices."""

    world_size: Count = 1
    """Training processes, one per device."""
    fsdp_size: Count | None = None
    """Ranks that share one copy of the weights; null: all (FSDP). Smaller than the world: HSDP."""
    sequence_parallel: Count = 1
    """Ulysses ranks per sequence; must divide the attention heads."""
    reshard_after_forward: bool = True
    offload_parameters: bool = False
    """Keep the master weights in host memory, and with them AdamW's state and update; each block comes to the device
    for its passes. Slow; for models that do not fit otherwise."""
    offload_optimizer: bool = False
    """Keep AdamW's state in host memory."""
    offload_reference: bool = True
    """Keep the reference model's weights in host memory between its passes."""


class OptimizerConfig(Frozen):
    """AdamW."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Applied to matrices only, not to norms, biases and embeddings."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    warmup_updates: Annotated[int, Field(ge=0)] = 10
    """Optimiser updates (not steps) over which the rate grows from 0."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class ModelConfig(Frozen):
    """The policy."""

    source: ModelSource = TinyModel()
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Forward and backward; master weights and reductions are float32."""
    gradient_checkpointing: bool = True
    freeze_vision: bool = False
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
