"""A Hugging Face folder out of the trained shards: hub layout, read back and compared before it counts as done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dapo.errors import CheckpointError
from dapo.model.load import EXPERT_SUFFIXES, expert_names
from dapo.train import export_check
from dapo.train.snapshot import Snapshot

FILE_BYTES = 4 * 2**30


def write(folder: Path, source: Path, snapshot: Snapshot) -> None:
    """Weights, config, tokenizer and processor files, read back and compared (`export_check`); in any thread.

    Args:
        source: the folder the model was loaded from; everything but its weights is copied.

    Raises:
        CheckpointError: the folder cannot be written, or does not read back as what was trained.
    """
    try:
        _copy_companions(source, folder, snapshot.dtype)
        writer = _Writer(folder, experts_apart=snapshot.text_only)
        for name, tensor in snapshot.tensors.items():
            writer.add(name, tensor)
        writer.close()
        export_check.compare(folder, snapshot)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the export could not be written to {folder}: {error}") from error


class _Writer:
    """Fills safetensors files up to a size, then writes the index.

    Args:
        experts_apart: a tensor per expert and projection, as Qwen3-MoE's files hold them; else fused and transposed.
    """

    def __init__(self, folder: Path, *, experts_apart: bool) -> None:
        self.folder, self.experts_apart = folder, experts_apart
        folder.mkdir(parents=True, exist_ok=True)
        self._waiting: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if not name.endswith(EXPERT_SUFFIXES):
            self._add(name, tensor)
        elif self.experts_apart:
            for expert, fused in enumerate(tensor):
                names = expert_names(name, expert)
                for part, rows in zip(names, fused.chunk(len(names)), strict=True):
                    self._add(part, rows.clone())  # safetensors refuses tensors that share memory
        else:
            self._add(name, tensor.transpose(1, 2).contiguous())

    def _add(self, name: str, tensor: Tensor) -> None:
        if self._bytes + tensor.nbytes > FILE_BYTES and self._waiting:
            self._flush()
        self._waiting[name] = tensor
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._waiting, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._waiting))
        self._waiting, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def close(self) -> None:
        self._flush()
        count = len(self._files)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        index: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._part(number).rename(self.folder / file)
            index |= dict.fromkeys(names, file)
        text = json.dumps({"metadata": {"total_size": self._total}, "weight_map": index}, indent=1)
        (self.folder / "model.safetensors.index.json").write_text(text)


def _copy_companions(source: Path, folder: Path, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt") and "index.json" not in path.name:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text())
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
