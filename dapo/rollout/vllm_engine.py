"""vLLM and vLLM-Ascend behind `Engine`: one adapter for 0.23 to 0.32, embedded in the worker's process by default."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dapo.errors import ConfigError, EngineError
from dapo.model.tensors import SMALLEST_BUCKET
from dapo.rollout import ascend
from dapo.rollout.engine import Begun, collected
from dapo.rollout.ipc import CudaIpc, SharedMemory
from dapo.rollout.routed_experts import expert_layers
from dapo.rollout.transport import Carrier, send_weights
from dapo.rollout.verification import agreed_sums
from dapo.rollout.vllm_core import CoreWatch, child_processes
from dapo.rollout.vllm_process import start_vllm, stop_vllm
from dapo.rollout.vllm_requests import Requests
from dapo.rollout.vllm_sleep import SLEEP_LEVEL, free_bytes
from dapo.rollout.vllm_worker import to_checkpoint_names
from dapo.types import Completion, Finished, Prompt, SamplingParams

if TYPE_CHECKING:
    from dapo.config.run import RunConfig
    from dapo.data.processor import PromptProcessor


class VllmEngine:
    """`Engine` on vLLM.

    Args:
        weights: a Hugging Face folder (MoE: experts in hub layout, as `save_pretrained` of this project writes them).
        processor: of the same folder.
        dtype: of weights and cache.
        device: cpu, cuda or npu.
        max_model_len: longest prompt and response together, tokens.
        kv_cache_mib: cache on CPU, where vLLM would otherwise take most of the machine's memory.
        memory_share: of an accelerator's memory, for weights and cache.
        tensor_parallel: ranks that share this engine. Above 1 each of them makes one with the same arguments inside a
            running process group and gets the same requests (vLLM's external launcher).
        separate_process: run the engine in processes of its own, one per tensor-parallel rank besides its core; this
            process alone makes it. Weights then go through shared memory (CUDA: IPC).
        chunked_prefill: on accelerators; vLLM on CPU cannot, with a seed per request.
        max_images: per prompt.
        answer_s: how long an engine in a process of its own may be silent before it is killed.
        return_routed_experts: completions say which experts were chosen (`Completion.experts`); not on CPU.

    Raises:
        ConfigError: vLLM is not installed, or refuses these arguments, or they are known to crash it.
    """

    def __init__(
        self,
        weights: Path,
        processor: PromptProcessor,
        *,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        max_model_len: int = 1024,
        max_num_seqs: int = 256,
        kv_cache_mib: int = 256,
        memory_share: float = 0.7,
        tensor_parallel: int = 1,
        expert_parallel: bool = False,
        chunked_prefill: bool = True,
        eager: bool = True,
        separate_process: bool = False,
        max_images: int = 4,
        return_routed_experts: bool = False,
        answer_s: float = 600.0,
    ) -> None:
        self.processor, self.folder, self.platform = processor, Path(weights), torch.device(device).type
        if self.platform == "cpu":
            _refuse_on_cpu(tensor_parallel, expert_parallel, return_routed_experts)
        self.version, self._asleep = 0, frozenset[str]()
        self._separate = separate_process
        self.vocab_size = processor.vocab_size
        arguments: dict[str, Any] = {
            "model": str(weights),
            "runner": "generate",
            "dtype": dtype,
            "seed": 0,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel,
            "enable_expert_parallel": expert_parallel,
            "enable_chunked_prefill": chunked_prefill and self.platform != "cpu",
            "enforce_eager": eager,
            # After temperature, top-k, top-p and bans: what the token was really drawn from.
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "worker_extension_cls": "dapo.rollout.vllm_worker.WorkerExtension",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        self._expert_layers: Sequence[int] = ()
        if return_routed_experts:
            self._expert_layers = expert_layers(Path(weights))
            arguments["enable_return_routed_experts"] = True
        if processor.has_images:
            arguments["limit_mm_per_prompt"] = {"image": max_images, "video": 0}
            arguments["mm_processor_cache_gb"] = 0
            arguments["skip_mm_profiling"] = self.platform == "cpu"
        if tensor_parallel > 1 and not separate_process:
            arguments["distributed_executor_backend"] = "external_launcher"
        if self.platform == "cpu":
            arguments |= _cpu_arguments(kv_cache_mib, max_model_len)
        else:
            arguments |= {"gpu_memory_utilization": memory_share, "enable_sleep_mode": True}
        if self.platform == "npu":
            version = ascend.installed_version()
            ascend.check_environment(version, eager=eager)
            ascend.set_environment(version)
            arguments |= ascend.engine_arguments(version, eager=eager)
        self._owns_process_group = not torch.distributed.is_initialized()
        mine = child_processes()
        self.llm = start_vllm(arguments, platform=self.platform, separate_process=separate_process)
        self._core: CoreWatch | None = None
        if separate_process:
            started = child_processes() - mine
            self._core = CoreWatch(self.llm.llm_engine.engine_core, sorted(started, key=str), answer_s)
        self._rpc("dapo_start", self.platform, os.getpid())

    @classmethod
    def from_config(
        cls, config: RunConfig, weights: Path, processor: PromptProcessor, device: torch.device
    ) -> VllmEngine:
        """The engine of a run's configuration.

        Raises:
            ConfigError: it asks for what vLLM cannot do there.
        """
        rollout = config.rollout
        if device.type == "cpu" and 1 < rollout.tensor_parallel < rollout.devices:
            raise ConfigError(
                f"rollout.devices={rollout.devices} with rollout.tensor_parallel={rollout.tensor_parallel}: on CPU "
                "each tensor-parallel group of vLLM takes shared memory of the same name, so that the second one of a "
                f"machine cannot start; use rollout.tensor_parallel=1, or rollout.devices={rollout.tensor_parallel}"
            )
        return cls(
            weights,
            processor,
            dtype=config.engine_dtype,
            device=device,
            max_model_len=config.max_sequence_tokens,
            max_num_seqs=rollout.max_num_seqs,
            kv_cache_mib=rollout.kv_cache_mib,
            memory_share=rollout.memory_share,
            tensor_parallel=rollout.tensor_parallel,
            expert_parallel=rollout.expert_parallel,
            chunked_prefill=rollout.chunked_prefill,
            eager=rollout.eager,
            separate_process=rollout.separate_process,
            answer_s=rollout.deadline_s / 3,  # in time to be started again before the round's deadline ends the job
            return_routed_experts=rollout.router_replay,
        )

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        return collected(self.stream(prompts, params), len(prompts), params.n)

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun = ()) -> Iterator[Finished]:
        """See `Engine.stream`. The samples of a new prompt are given together, when the last of them ended; one by one
        only where the round may end early."""
        if self._asleep:
            raise EngineError(f"generate was called while the engine sleeps ({', '.join(sorted(self._asleep))})")
        requests = Requests(
            self.llm.llm_engine,
            self.processor,
            self.vocab_size,
            self.version,
            expert_layers=self._expert_layers,
            asked=self._asked,
        )
        yield from requests.stream(prompts, params, begun)

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, unchanged: Collection[str] = ()
    ) -> None:
        """In place, layer by layer: no second copy of the model, no file on disk.

        Raises:
            EngineError: a tensor does not fit, a fused group came in part, or responses are still being written.
                Another whole update repairs the engine.
        """
        if "weights" in self._asleep:
            self._wake("weights")
        try:
            self._rpc("dapo_begin_update", sorted(unchanged))
            if self._separate:
                send_weights(weights, self._carrier(), self._bucket_bytes())
            else:
                self._rpc("dapo_load", to_checkpoint_names(weights))
            self._rpc("dapo_finish_update")
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"weight sync to version {version} failed: {type(error).__name__}: {error}") from error
        # Attention blocks and image features of the old weights must not be found again.
        with self._asked():
            forgotten = self.llm.reset_prefix_cache()
            self.llm.llm_engine.reset_encoder_cache()
        if not forgotten:
            raise EngineError(
                f"weight sync to version {version}: vLLM kept attention blocks of the old weights, because responses "
                "are still being written (reset_prefix_cache returned False); sync between rounds"
            )
        self.version = version

    def fingerprint(self) -> dict[str, float]:
        """Of what the workers were given last, summed where they took it. What they made of it (packing, transposing)
        is for the log-prob probe to judge. Empty before the first update.

        Raises:
            EngineError: the workers were given different weights.
        """
        return agreed_sums(self._rpc("dapo_fingerprint"))

    def sleep(self) -> int | None:
        """Free the cache, and move the weights to host memory. vLLM on CPU cannot: nothing happens there."""
        if self.platform not in SLEEP_LEVEL or self._asleep:
            return None
        before = free_bytes(self.platform)
        with self._asked():
            self.llm.sleep(level=SLEEP_LEVEL[self.platform])
        self._asleep = frozenset({"weights", "kv_cache"})
        return free_bytes(self.platform) - before

    def wake(self) -> bool:
        slept = bool(self._asleep)
        for part in ("weights", "kv_cache"):
            if part in self._asleep:
                self._wake(part)
        return slept

    def close(self) -> None:
        """Stop the engine and give its memory back; a new one may be made in this process afterwards."""
        if self._core is not None:
            self._core.close()
        stop_vllm(self.llm, owns_process_group=self._owns_process_group)
        if self._core is not None:
            self._core.end_workers()
        del self.llm

    # workers

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        with self._asked():
            results: list[Any] = self.llm.collective_rpc(method, args=args)
        return results

    def _asked(self) -> AbstractContextManager[None]:
        """Round each call that waits for vLLM's answer."""
        return nullcontext() if self._core is None else self._core.asked()

    def _wake(self, part: str) -> None:
        with self._asked():
            self.llm.wake_up(tags=[part])
        self._asleep -= {part}

    def _carrier(self) -> Carrier:
        def deliver(header: bytes, place: bytes) -> None:
            self._rpc("dapo_take", header, place)

        if self.platform == "cuda":
            return CudaIpc(torch.device("cuda", torch.cuda.current_device()), deliver)
        return SharedMemory(deliver)

    def _bucket_bytes(self) -> int:
        """A sixteenth of the model, so that no rank holds much of it twice."""
        files = self.folder.glob("*.safetensors")
        return max(SMALLEST_BUCKET, sum(f.stat().st_size for f in files) // 16)


def _refuse_on_cpu(tensor_parallel: int, expert_parallel: bool, return_routed_experts: bool) -> None:
    if expert_parallel and tensor_parallel > 1:
        raise ConfigError(
            f"rollout.expert_parallel=true with rollout.tensor_parallel={tensor_parallel}: vLLM's kernel for CPU "
            "ignores which experts a rank holds and crashes; use rollout.expert_parallel=false there"
        )
    if return_routed_experts:
        raise ConfigError(
            "rollout.router_replay=true: vLLM on CPU does not report which experts it chose (its model runner "
            "there has no auxiliary outputs); use rollout.engine=transformers, or rollout.router_replay=false"
        )


def _cpu_arguments(kv_cache_mib: int, max_model_len: int) -> dict[str, Any]:
    return {
        "kv_cache_memory_bytes": kv_cache_mib * 2**20,
        # The smallest that vLLM has kernels for: the samples of a prompt share whole blocks of it only, and its own
        # choice, 128, is longer than many prompts are.
        "block_size": 32,
        # A prompt prefilled in part takes back its request's random number, which CPU generators cannot
        # ("CPU Generator does not use offset", 0.32): so prompts are prefilled whole there.
        "max_num_batched_tokens": max(4096, max_model_len),
    }
