"""The generation engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dapo.config.base import Frozen

Count = Annotated[int, Field(ge=1)]


class RolloutConfig(Frozen):
    """How responses are sampled during training."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """`auto`: vLLM where it is installed and an accelerator is present, else transformers."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: the model's compute dtype."""
    devices: Annotated[int, Field(ge=0)] = 0
    """Devices of their own for the engines; 0: each training device holds an engine too (colocated)."""
    ahead: bool = False
    """One-step-off-policy: generate the next step's groups while this one is trained on. Needs `devices`."""
    finish_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Partial rollouts: a round ends when this share of its groups is complete, and unfinished responses continue in
    the next round with its weights. 1.0: every round is generated to its end."""
    separate_process: bool = False
    """vLLM in a process of its own beside the one that uses it and hands it weights through shared memory (CUDA: IPC):
    it can die and be restarted without the trainer. Not with `tensor_parallel` above 1."""
    tensor_parallel: Count = 1
    expert_parallel: bool = False
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of a device's memory for the engine (accelerators only)."""
    kv_cache_mib: Count = 256
    """Key-value cache on CPU."""
    max_num_seqs: Count = 256
    """Sequences decoded together."""
    chunked_prefill: bool = True
    eager: bool = True
    """No graph capture."""
    deadline_s: Annotated[float, Field(gt=0)] = 1800.0
    """A generation round, a weight sync, a sleep or a wake-up that takes longer means a hung engine. One beside the
    trainer (`devices`) is restarted; with a colocated one the job is. With `separate_process` an engine silent for a
    third of it is killed and restarted."""
    restarts: Annotated[int, Field(ge=0)] = 2
    """Engine restarts a step may use before the run fails."""
    router_replay: bool = False
    """Mixture of experts: train with the experts that the engine chose, so that both compute the same function where
    their routers would differ (arXiv 2510.11370). Not with vLLM on CPU, which does not report them."""
    probe_every: Annotated[int, Field(ge=0)] = 1
    """Steps between log-prob probes (engine against trainer on fixed prompts). Nothing else proves which weights an
    engine computes with; one is a batch of four short responses. 0: only after the start, restarts and wake-ups."""
    probe_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Mean |difference| in nats that stops the run; null: 1e-3, or 0.05 where trainer or engine compute in bfloat16."""
