"""From a Hugging Face folder to a model in place: built without memory, sharded, then filled slice by slice.

Each rank reads only the bytes of its own shards from the safetensors files, so no rank ever holds the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from dapo.errors import WeightsError
from dapo.model.attention import ATTENTION, VISION_ATTENTION
from dapo.model.experts import EXPERTS
from dapo.model.linear import route_products

_AUTO = {
    "qwen3_vl": AutoModelForImageTextToText,
    "qwen3_vl_moe": AutoModelForImageTextToText,
    "qwen3": AutoModelForCausalLM,
    "qwen3_moe": AutoModelForCausalLM,
}
BUILDING = Lock()
"""While transformers builds a model it changes what all threads of the process see: the default dtype, tied weights."""
EXPERT_SUFFIXES = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Fused expert weights, [E, out, in] in transformers. The hub's files hold [E, in, out] for Qwen3-VL-MoE, and a tensor
per expert and projection for Qwen3-MoE (`expert_names`)."""


def load_model(
    folder: Path,
    *,
    device: torch.device,
    home: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    shard: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """Qwen3-VL or text-only Qwen3, dense or MoE, with our attention and experts, in training mode.

    Args:
        folder: config.json and safetensors files.
        device: where the model computes.
        home: where its parameters are put, if elsewhere: in host memory, for FSDP to bring them.
        dtype: of the parameters (the master weights, not the compute dtype).
        shard: is given the model without memory and may make its parameters DTensors (`fully_shard`).

    Raises:
        WeightsError: not such a folder, an architecture we do not train, missing or misshapen tensors.
    """
    config = _config(folder)
    with BUILDING, torch.device("meta"):
        model: PreTrainedModel = _AUTO[config.model_type].from_config(
            config, attn_implementation=ATTENTION, dtype=dtype
        )
    if any(name.endswith(EXPERT_SUFFIXES) for name, _ in model.named_parameters()):
        model.set_experts_implementation(EXPERTS[device.type])
    if hasattr(model.model, "visual"):
        model.model.visual.config._attn_implementation = VISION_ATTENTION
    route_products(model, device)
    if shard is not None:
        shard(model)
    files = WeightFiles(folder)
    state: dict[str, nn.Parameter] = {}
    placed: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in placed:  # tied weights are one parameter under two names
            placed[id(parameter)] = nn.Parameter(_filled(files, name, parameter, home or device, dtype))
        state[name] = placed[id(parameter)]
    model.load_state_dict(state, strict=False, assign=True)
    _fill_buffers(model, device)
    return model.train()


class WeightFiles:
    """The tensors of a folder's safetensors files, read slice by slice; experts in transformers' layout.

    Raises:
        WeightsError: no safetensors file, an unreadable one, or an index that names a file that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            single = folder / "model.safetensors"
            if not single.exists():
                raise WeightsError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
            self._file_of = dict.fromkeys(self._open(single.name).keys(), single.name)
        missing = sorted({f for f in self._file_of.values() if not (folder / f).exists()})
        if missing:
            raise WeightsError(f"{index} names files that are not there: {', '.join(missing)}; fetch the folder again")

    def read(self, name: str, shape: tuple[int, ...], rows: slice) -> Tensor:
        """Rows of the first dimension of a tensor that must have this shape."""
        if name not in self._file_of and name.endswith(EXPERT_SUFFIXES):
            return self._experts(name, shape, rows)
        if name not in self._file_of:
            raise WeightsError(f"{self.folder} has no tensor {name}: the weights are partial; fetch the folder again")
        part = self._open(self._file_of[name]).get_slice(name)
        found = tuple(part.get_shape())
        transposed = (shape[0], *reversed(shape[1:]))
        if name.endswith(EXPERT_SUFFIXES) and found == transposed:
            return part[rows].transpose(1, 2).contiguous()
        if found != shape:
            raise WeightsError(
                f"{name} in {self.folder} has shape {list(found)}, config.json asks for {list(shape)}: weights and "
                "config.json do not belong together"
            )
        tensor: Tensor = part[rows] if shape else part[...]
        return tensor

    def _experts(self, name: str, shape: tuple[int, ...], rows: slice) -> Tensor:
        """Experts that lie in tensors of their own, as rows of the fused tensor."""
        experts, out, width = shape
        chosen = range(*rows.indices(experts))
        parts = [expert_names(name, expert) for expert in chosen]
        size = (out // len(parts[0]), width) if parts else ()
        whole = [torch.cat([self.read(part, size, slice(None)) for part in names]) for names in parts]
        return torch.stack(whole) if whole else torch.empty(0, out, width)

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(str(self.folder / file), framework="pt")
            except Exception as error:
                raise WeightsError(f"{self.folder / file} is not a whole safetensors file: {error}") from error
        return self._opened[file]


def expert_names(fused: str, expert: int) -> tuple[str, ...]:
    """Names of one expert's tensors in Qwen3-MoE's files, in the order in which the fused tensor holds their rows."""
    experts, _, last = fused.rpartition(".")
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    return tuple(f"{experts}.{expert}.{part}.weight" for part in parts)


def local_rows(parameter: Tensor) -> slice:
    """The rows of the first dimension that this rank holds of a parameter (all of a plain tensor)."""
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                ranks, rank = parameter.device_mesh.size(axis), parameter.device_mesh.get_local_rank(axis)
                size = -(-parameter.shape[0] // ranks)
                start = min(rank * size, parameter.shape[0])
                return slice(start, min(start + size, parameter.shape[0]))
    return slice(0, parameter.shape[0] if parameter.dim() else None)


def _config(folder: Path) -> Any:
    if not (folder / "config.json").exists():
        raise WeightsError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if config.model_type not in _AUTO:
        raise WeightsError(f"{folder} holds a {config.model_type!r} model; this trainer knows {', '.join(_AUTO)}")
    return config


@torch.no_grad()
def _filled(files: WeightFiles, name: str, parameter: nn.Parameter, home: torch.device, dtype: torch.dtype) -> Tensor:
    """A real tensor of this rank's rows, in the place of a parameter without memory."""
    rows = files.read(name, tuple(parameter.shape), local_rows(parameter))
    if not isinstance(parameter, DTensor):
        return rows.to(device=home, dtype=dtype)
    # Not by DTensor.from_local: that would move the rows to the mesh's device.
    sharded: Any = torch.empty_like(parameter, dtype=dtype, device=home)
    sharded.to_local().copy_(rows)
    filled: Tensor = sharded
    return filled


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Rotary tables are not in the files: transformers' own initialisation computes them."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
        if "RotaryEmbedding" in type(module).__name__:
            model._init_weights(module)
