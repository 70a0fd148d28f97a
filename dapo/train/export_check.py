"""Verifies an export: gathered right, written right, and loaded the same by plain transformers.

All of it is bit for bit. Independent of the code it checks: the hub's layout is defined here a second time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from dapo.errors import CheckpointError
from dapo.model.load import BUILDING, EXPERT_SUFFIXES
from dapo.model.tensors import checksum
from dapo.train.snapshot import Snapshot

log = logging.getLogger(__name__)

_LAYERS = 2
"""Decoder layers that plain transformers loads, beside everything else: it treats all layers alike, and the whole of a
large model would need twice its size in memory."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare(folder: Path, snapshot: Snapshot) -> None:
    """Shards against the gathered weights, these against the files, and these against what plain transformers loads.

    Raises:
        CheckpointError: they differ anywhere.
    """
    try:
        _compare_gathered(snapshot)
        _compare_written(folder, snapshot)
        _compare_loaded(folder, snapshot)
    except _DifferenceError as difference:
        raise CheckpointError(f"export to {folder}: {difference}; do not use this folder") from None
    log.info("export to %s is the trained model bit for bit, and plain transformers loads it so", folder)


class _DifferenceError(Exception):
    """What differs."""


def _compare_gathered(snapshot: Snapshot) -> None:
    for name, tensor in snapshot.tensors.items():
        checksums = snapshot.checksums[name]
        rows = -(-len(tensor) // len(checksums))
        found = tuple(checksum(tensor[rank * rows : (rank + 1) * rows]) for rank in range(len(checksums)))
        if found != checksums:
            wrong = [rank for rank, (a, b) in enumerate(zip(found, checksums, strict=True)) if a != b]
            raise _DifferenceError(f"{name} was not gathered as the shards of ranks {wrong} hold it")


def _compare_written(folder: Path, snapshot: Snapshot) -> None:
    """Names, shapes, values, and the index, if there is one."""
    expected = _in_hub_layout(snapshot)
    shapes = _fused_shapes(AutoConfig.from_pretrained(folder).get_text_config())
    file_of: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name not in expected:
                    raise _DifferenceError(f"{file.name} holds {name}, which the model does not have")
                written, file_of[name] = opened.get_tensor(name), file.name
                wanted = shapes.get(name.rpartition("mlp.experts.")[2], tuple(expected[name].shape))
                if tuple(written.shape) != wanted:
                    raise _DifferenceError(
                        f"{name} has shape {list(written.shape)}, the hub's layout is {list(wanted)}"
                    )
                if not _same_bits(written, expected[name]):
                    raise _DifferenceError(f"{name} reads back with other values than were trained")
    if missing := sorted(expected.keys() - file_of.keys()):
        raise _DifferenceError(f"{missing[0]} and {len(missing) - 1} other tensors are missing")
    index = folder / "model.safetensors.index.json"
    if index.exists() and json.loads(index.read_text())["weight_map"] != file_of:
        raise _DifferenceError(f"{index.name} does not say which file holds which tensor")


def _in_hub_layout(snapshot: Snapshot) -> dict[str, Tensor]:
    """The trained weights as the hub names and turns them, without a copy."""
    views: dict[str, Tensor] = {}
    for name, tensor in snapshot.tensors.items():
        if not name.endswith(EXPERT_SUFFIXES):
            views[name] = tensor
        elif not snapshot.text_only:
            views[name] = tensor.transpose(1, 2)  # [E, out, in] in transformers, [E, in, out] in the hub
        else:
            experts, _, part = name.rpartition(".")
            for number, expert in enumerate(tensor):
                if part == "down_proj":
                    views[f"{experts}.{number}.down_proj.weight"] = expert
                else:
                    half = len(expert) // 2
                    views[f"{experts}.{number}.gate_proj.weight"] = expert[:half]
                    views[f"{experts}.{number}.up_proj.weight"] = expert[half:]
    return views


def _fused_shapes(text: Any) -> dict[str, tuple[int, ...]]:
    """Of a layer's fused experts in the hub, as config.json implies them.

    Where two sides are equally long the shape does not show a transposed tensor; its values do.
    """
    if not hasattr(text, "moe_intermediate_size"):
        return {}
    experts, hidden, inner = text.num_experts, text.hidden_size, text.moe_intermediate_size
    return {"gate_up_proj": (experts, hidden, 2 * inner), "down_proj": (experts, inner, hidden)}


def _compare_loaded(folder: Path, snapshot: Snapshot) -> None:
    """Names of the model's own, expert layout, tied head and config: what plain transformers makes of the files."""
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    whole = text.num_hidden_layers <= _LAYERS
    if not whole:
        text.num_hidden_layers = _LAYERS
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:_LAYERS]
    auto = AutoModelForCausalLM if snapshot.text_only else AutoModelForImageTextToText
    # Not in bfloat16: while transformers loads a model, its dtype is the default of the whole process.
    wide = torch.promote_types(snapshot.dtype, torch.float32)
    with BUILDING, _quiet():
        try:
            plain = auto.from_pretrained(folder, config=config, dtype=wide)
        except (RuntimeError, ValueError) as error:
            raise _DifferenceError(
                f"plain transformers does not load it (its report is in the log): {error}"
            ) from error
    loaded = dict(plain.named_parameters(remove_duplicate=False))
    tied = "lm_head.weight" in snapshot.aliases
    if plain.config.tie_word_embeddings != tied:  # transformers may see through it, engines take config.json's word
        raise _DifferenceError(f"config.json has tie_word_embeddings={not tied}, the trained model's is {tied}")
    trained = snapshot.tensors | {name: snapshot.tensors[first] for name, first in snapshot.aliases.items()}
    if whole and loaded.keys() != trained.keys():
        raise _DifferenceError(f"plain transformers has other tensors: {sorted(loaded.keys() ^ trained.keys())}")
    for name, parameter in loaded.items():
        if name not in trained:
            raise _DifferenceError(f"plain transformers has a tensor {name}, which was not trained")
        if name.endswith(EXPERT_SUFFIXES) and parameter.shape[1] == parameter.shape[2] and not snapshot.text_only:
            continue  # transformers decides by the shape whether to transpose, so it cannot load these
        if not _same_bits(parameter.detach().to(snapshot.dtype), trained[name]):
            raise _DifferenceError(f"plain transformers loads {name} with other values than were trained")


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports the layers that we leave out."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_worth_reading)
    try:
        yield
    finally:
        logger.removeFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "LOAD REPORT" not in text or any(word in text for word in ("MISSING", "MISMATCH", "CONVERSION"))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = _BITS[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))
