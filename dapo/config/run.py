"""The whole configuration of a run: one tree, saved resolved with the run, enough to repeat it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dapo.config.algorithm import AlgorithmConfig
from dapo.config.base import Frozen
from dapo.config.data import DataConfig, RewardConfig, ValidationConfig
from dapo.config.model import ModelConfig
from dapo.config.rollout import RolloutConfig

Count = Annotated[int, Field(ge=1)]


class BatchConfig(Frozen):
    """Counted in prompts; everything else follows."""

    prompts_per_step: Count = 64
    """Groups trained on per step."""
    prompts_per_update: Count = 16
    """Groups per optimiser update; divides prompts_per_step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses per prompt (G)."""
    prompts_per_round: Count | None = None
    """Prompts of the first generation round; null: as many as the measured keep rate requires."""
    max_response_tokens: Count = 2048
    tokens_per_pack: Count = 3072
    """Token budget of one forward pass of one sequence-parallel group."""


class TrainConfig(Frozen):
    """Length of the training, validation and checkpoints."""

    steps: Count = 100
    epochs: Count = 30
    """The run ends after `steps` steps or `epochs` passes over the prompts, whichever is first."""
    test_freq: Annotated[int, Field(ge=0)] = 1
    """Validate every so many steps (and after the last); 0: only at the end."""
    save_freq: Annotated[int, Field(ge=0)] = 20
    """Save a checkpoint every so many steps (and after the last); 0: only at the end."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept; the best by validation accuracy is kept besides."""
    mirror: str | None = None
    """URL of a folder (s3://bucket/runs): checkpoints are copied there, and a machine without any resumes from it."""
    deadline_s: Annotated[float, Field(gt=0)] = 14400.0
    """A pass for log-probabilities, an update, or the copy for a checkpoint that takes longer means a hung trainer: the
    job is started again (`ray.restarts`). Keep it far above what the longest of them takes."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: go on from the newest whole checkpoint of this run."""


class RayConfig(Frozen):
    """Where the training job runs."""

    address: str | None = None
    """Dashboard address of a cluster (http://host:8265); null: a Ray on this machine, started if there is none."""
    token_env: str = "RAY_AUTH_TOKEN"
    """Name of the environment variable that holds the cluster's token, where it requires one."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the job and all its workers (goes by runtime_env)."""
    preload: dict[str, str] = Field(default_factory=dict)
    """Variables that must exist before a process starts (LD_PRELOAD): checked on the workers, not only set."""
    restarts: Annotated[int, Field(ge=0)] = 2
    """Times a crashed job is started again; it resumes from its last checkpoint."""
    cancel: Literal["checkpoint", "now"] = "checkpoint"
    """What a cancelled flow run's job does first: save a checkpoint, if that takes at most 25 s; or nothing."""


class MlflowConfig(Frozen):
    """Where the run is recorded."""

    tracking_uri: str | None = None
    """Any MLflow URI; null: MLFLOW_TRACKING_URI, else sqlite in `run_root`."""
    experiment: str = "dapo"
    registered_model: str | None = None
    """Registry name for checkpoints; null: not registered."""


class RunConfig(Frozen):
    """A DAPO run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "geo3k-tiny"
    """Names the run folder, the Ray job and the MLflow run."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """`auto`: NPU, else CUDA, else CPU, whatever is present. A named device must be present."""
    run_root: str = "runs"
    """Folder that holds one folder per run."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    validation: ValidationConfig = ValidationConfig()
    train: TrainConfig = TrainConfig()
    ray: RayConfig = RayConfig()
    mlflow: MlflowConfig = MlflowConfig()

    @property
    def updates_per_step(self) -> int:
        return self.batch.prompts_per_step // self.batch.prompts_per_update

    @property
    def max_sequence_tokens(self) -> int:
        return self.data.max_prompt_tokens + self.batch.max_response_tokens

    @property
    def data_parallel(self) -> int:
        """Groups of sequence-parallel ranks: each trains on its own packs."""
        return self.model.parallel.world_size // self.model.parallel.sequence_parallel

    @property
    def devices(self) -> int:
        """All devices of the run: those that train and those that only generate."""
        return self.model.parallel.world_size + self.rollout.devices

    @property
    def engine_dtype(self) -> Literal["float32", "bfloat16"]:
        """In which the engines compute."""
        return self.model.compute_dtype if self.rollout.dtype == "auto" else self.rollout.dtype

    def derived(self) -> dict[str, int | str]:
        """Numbers that follow from the independent ones; printed at the start."""
        p = self.model.parallel
        fsdp = p.fsdp_size or p.world_size
        return {
            "updates per step": self.updates_per_step,
            "responses per step": self.batch.prompts_per_step * self.batch.group_size,
            "responses per update": self.batch.prompts_per_update * self.batch.group_size,
            "longest sequence (tokens)": self.max_sequence_tokens,
            "data-parallel ranks": self.data_parallel,
            "sharding": f"FSDP {fsdp}" if fsdp == p.world_size else f"HSDP {p.world_size // fsdp} x {fsdp}",
        }

    @model_validator(mode="after")
    def _numbers_fit(self) -> RunConfig:
        b, p = self.batch, self.model.parallel
        if b.prompts_per_step % b.prompts_per_update:
            fits = [n for n in range(1, b.prompts_per_step + 1) if b.prompts_per_step % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - b.prompts_per_update))[:2])
            raise ValueError(
                f"batch.prompts_per_update={b.prompts_per_update} must divide batch.prompts_per_step="
                f"{b.prompts_per_step} (a step makes whole updates); try {' or '.join(map(str, near))}"
            )
        if b.tokens_per_pack < self.max_sequence_tokens:
            raise ValueError(
                f"batch.tokens_per_pack={b.tokens_per_pack} cannot hold the longest sequence: data.max_prompt_tokens "
                f"+ batch.max_response_tokens = {self.max_sequence_tokens}; raise it to at least that"
            )
        if p.world_size % p.sequence_parallel:
            raise ValueError(
                f"model.parallel.sequence_parallel={p.sequence_parallel} must divide "
                f"model.parallel.world_size={p.world_size}"
            )
        if p.fsdp_size and p.world_size % p.fsdp_size:
            raise ValueError(
                f"model.parallel.fsdp_size={p.fsdp_size} must divide model.parallel.world_size={p.world_size}"
            )
        r = self.rollout
        engines, called = (r.devices, "rollout.devices") if r.devices else (p.world_size, "model.parallel.world_size")
        if engines % r.tensor_parallel:
            raise ValueError(f"rollout.tensor_parallel={r.tensor_parallel} must divide {called}={engines}")
        if r.ahead and not r.devices:
            raise ValueError(
                "rollout.ahead=true generates while the training devices train: give the engines devices of their own "
                "(rollout.devices=N)"
            )
        if r.separate_process and r.engine == "transformers":
            raise ValueError(
                "rollout.separate_process=true is a way to run vLLM, and rollout.engine=transformers is not: set it to "
                "false, or rollout.engine=vllm"
            )
        if r.separate_process and r.tensor_parallel > 1:
            raise ValueError(
                f"rollout.separate_process=true with rollout.tensor_parallel={r.tensor_parallel}: a worker sees one "
                "device, and an engine in a process of its own has no other; use rollout.separate_process=false, or "
                "rollout.tensor_parallel=1"
            )
        staleness = r.ahead + (r.finish_share < 1)
        if self.algorithm.sampling.max_staleness < staleness:
            raise ValueError(
                f"rollout.ahead={str(r.ahead).lower()} and rollout.finish_share={r.finish_share} train on responses "
                f"that are {staleness} policy versions old: algorithm.sampling.max_staleness must be at least that"
            )
        if (r.ahead or r.finish_share < 1) and self.algorithm.sampling.compat == "verl":
            raise ValueError("algorithm.sampling.compat=verl has neither rollout.ahead nor rollout.finish_share")
        if r.finish_share < 1 and r.router_replay:
            raise ValueError(
                f"rollout.finish_share={r.finish_share} with rollout.router_replay=true: of a continued response the "
                "engine reports only the last part's experts; use one of the two"
            )
        if r.finish_share < 1 and self.algorithm.correction.kind == "off":
            raise ValueError(
                f"rollout.finish_share={r.finish_share} mixes policy versions within a response: switch the correction "
                "on (algorithm.correction.kind=truncate)"
            )
        over = self.algorithm.overlong
        if over.soft_punishment and over.buffer_tokens >= b.max_response_tokens:
            raise ValueError(
                f"algorithm.overlong.buffer_tokens={over.buffer_tokens} must be smaller than "
                f"batch.max_response_tokens={b.max_response_tokens}, else the penalty starts at the first token"
            )
        return self
