"""What runs inside vLLM's workers: taking weights in place, and proving which ones came.

vLLM adds `WorkerExtension` to the bases of its own worker class (GPU, CPU, NPU), so `self` is that worker. Every method
is called by name through `collective_rpc`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from dapo.errors import EngineError
from dapo.model.tensors import FUSED, absolute_sum, fused_group
from dapo.rollout.ipc import Opener
from dapo.rollout.verification import kept_sums

_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.\d+\.(?P<part>gate|up|down)_proj\.weight$")


def to_checkpoint_names(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """transformers' names to those vLLM loads.

    transformers 5 holds all experts of a layer in `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]; hub files hold
    them transposed, and vLLM transposes whatever comes under these names. One tensor per expert (`gate_proj` [I, H],
    `up_proj` [I, H], `down_proj` [H, I]) has no orientation to get wrong and loads in all versions; these are views.
    """
    for name, tensor in weights:
        experts, _, last = name.rpartition(".")
        if last == "gate_up_proj" and experts.endswith(".experts"):
            for number, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                yield f"{experts}.{number}.gate_proj.weight", gate
                yield f"{experts}.{number}.up_proj.weight", up
        elif last == "down_proj" and experts.endswith(".experts"):
            for number, down in enumerate(tensor):
                yield f"{experts}.{number}.down_proj.weight", down
        else:
            yield name, tensor


def to_transformers_name(name: str) -> str:
    """The tensor of transformers' state_dict that a checkpoint tensor is (part of)."""
    match = _EXPERT.match(name)
    if match is None:
        return name
    return f"{match['experts']}.{'down_proj' if match['part'] == 'down' else 'gate_up_proj'}"


def check_whole_groups(names: Iterable[str]) -> None:
    """Layers that vLLM stores fused must come whole: a lone q_proj leaves k and v uninitialised, without an error.

    Raises:
        EngineError: names what is missing of the first partial group.
    """
    came: dict[tuple[str, str, str], set[str]] = {}
    for name in names:
        layer, _, last = name.rpartition(".")
        parent, _, part = layer.rpartition(".")
        if part in FUSED:
            came.setdefault((parent, FUSED[part], last), set()).add(part)
    for (parent, module, last), parts in came.items():
        if missing := sorted({part for part, of in FUSED.items() if of == module} - parts):
            raise EngineError(
                f"weight sync: {parent}.{min(parts)}.{last} came without {', '.join(missing)}; the engine stores them "
                "as one tensor: send whole groups"
            )


def check_kept_groups(came: Iterable[str], unchanged: Collection[str]) -> None:
    """A module of which a part came must not be one of which another part was to be kept: it is loaded anew as a whole.

    Raises:
        EngineError: names the first tensor that came and one that was kept beside it.
    """
    kept = {fused_group(name): name for name in unchanged}
    for name in came:
        if beside := kept.get(fused_group(name)):
            raise EngineError(
                f"weight sync: {name} came without {beside}; the engine stores them as one module: send whole modules"
            )


class WorkerExtension:
    """Mixed into vLLM's worker; prefix `dapo_` keeps clear of its names."""

    model_runner: Any
    vllm_config: Any
    device: Any

    def dapo_start(self, platform: str, owner: int) -> None:
        """Once, after the model is loaded: the platform's repairs; processes of the engine's own end with their owner.

        Args:
            owner: number of the process that has the engine.
        """
        if owner != os.getpid():
            Thread(target=_end_with, args=(owner,), name="dapo-owner-watch", daemon=True).start()
        if platform == "npu":
            from dapo.rollout import ascend

            ascend.repair_worker(self)

    def dapo_begin_update(self, unchanged: list[str]) -> None:
        """Bring the layers back to the form in which they were before loading (undo packing and transposing).

        Args:
            unchanged: names that do not come; what they were proven to be is remembered.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        model = self.model_runner.get_model()
        given: dict[str, float] = getattr(self, "_dapo_sums", {})
        self._dapo_sums: dict[str, float] = kept_sums(given, unchanged)
        self._dapo_names: list[str] = []
        self._dapo_kept = unchanged
        self._dapo_opener = Opener()
        self._dapo_kernels: list[tuple[Any, Any]] = []
        if self._dapo_on_cpu():
            # vLLM 0.32 on CPU takes a second load of experts for an update of packed weights and leaves them
            # unpacked: no error, wrong answers (3.4 nats). Without its kernel object it packs again.
            for module in model.modules():
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    self._dapo_kernels.append((method, method.moe_kernel))
                    method.moe_kernel = None
        with torch.no_grad(), set_current_vllm_config(self.vllm_config), torch.device(self.device):
            initialize_layerwise_reload(model)

    def dapo_load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load some tensors, under checkpoint names; whole fused groups may be spread over several calls."""
        from vllm.config import set_current_vllm_config

        model = self.model_runner.get_model()
        with torch.no_grad(), set_current_vllm_config(self.vllm_config), torch.device(self.device):
            model.load_weights(self._dapo_noted(weights))

    def dapo_take(self, header: bytes, place: bytes) -> None:
        """Load the tensors of a bucket that another process of this machine offers, in transformers' layout."""
        self.dapo_load(to_checkpoint_names(self._dapo_opener.tensors(header, place)))

    def dapo_finish_update(self) -> None:
        """Pack and transpose again, into the memory the running engine reads."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload

        finalize: Any = reload.finalize_layerwise_reload
        runner = self.model_runner
        with torch.no_grad(), set_current_vllm_config(self.vllm_config), torch.device(self.device):
            finalize(runner.get_model(), runner.model_config)
            for method, kernel in self._dapo_kernels:
                if method.moe_kernel is None:  # of a layer that did not come: its packed weights are still there
                    method.moe_kernel = kernel
            if self._dapo_on_cpu():
                self._dapo_pack_head()
                # A NaN once written into a block of the cache leaks into every later sequence that reuses it.
                for cache in runner.kv_caches:
                    cache.zero_()
        # Only now: a layer left open could not be opened again by the next update.
        check_whole_groups(self._dapo_names)
        check_kept_groups(map(to_transformers_name, self._dapo_names), self._dapo_kept)

    def _dapo_pack_head(self) -> None:
        """A head tied to the embeddings receives no tensor of its own, so vLLM on CPU keeps its old packed copy."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def dapo_fingerprint(self) -> dict[str, float]:
        """Per transformers tensor: float64 sum of absolute values of what this worker was given last, whatever vLLM
        then did with it (0.23 drops what it has no place for)."""
        return dict(getattr(self, "_dapo_sums", {}))

    def _dapo_noted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            whole = to_transformers_name(name)
            self._dapo_names.append(name)
            self._dapo_sums[whole] = self._dapo_sums.get(whole, 0.0) + absolute_sum(tensor)
            yield name, tensor

    def _dapo_on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"


def _end_with(owner: int) -> None:
    """vLLM's core (0.23 to 0.32) outlives an owner that was killed, and keeps the device's memory."""
    while _alive(owner):
        time.sleep(1.0)
    core = multiprocessing.parent_process()
    if core is not None and core.pid is not None and core.pid != owner:
        with contextlib.suppress(ProcessLookupError):
            os.kill(core.pid, signal.SIGKILL)
    os._exit(1)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
