"""A Hugging Face folder out of the trained shards: hub layout, read back and compared before it counts as done."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dapo.errors import CheckpointError
from dapo.model.layout import PackLayout
from dapo.model.load import EXPERT_SUFFIXES, WeightFiles, expert_names
from dapo.model.network import Network, PackInputs
from dapo.model.vision import blank_image
from dapo.train import weights
from dapo.train.parallel import Layout, reshard

log = logging.getLogger(__name__)

FILE_BYTES = 4 * 2**30
_COMPARE_BELOW_BYTES = 4 * 2**30
"""Larger models are compared tensor by tensor only: plain transformers would need all of it in one process."""
_PROBE_TOKENS = 24


@dataclass(frozen=True)
class Snapshot:
    """What rank 0 needs to write an export and to check it, in host memory: nothing of it changes any more."""

    tensors: dict[str, Tensor]
    """Whole weights in the compute dtype, in transformers' names and layout."""
    fingerprint: dict[str, float]
    """Of the shards they were gathered from."""
    probe: tuple[list[int], Tensor]
    """A few token ids and their log-probabilities under these weights."""
    temperature: float
    banned: Tensor | None
    dtype: torch.dtype
    text_only: bool


def take(network: Network, dtype: torch.dtype, layout: Layout) -> Snapshot | None:
    """Gather everything on rank 0 (None on the others); collective, takes as long as a weight sync.

    Gathering needs the training's process group, so it cannot be left to the background. Rank 0's host holds one copy
    of the weights in the compute dtype until it is written.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.whole_tensors(network.model, dtype):
        if layout.rank == 0:
            tensors[name] = tensor.detach().to("cpu", copy=True)
    trained = weights.fingerprint(network.model, dtype, layout)
    probe = _probe(network, layout)
    if layout.rank:
        return None
    banned = None if network.banned is None else network.banned.cpu()
    return Snapshot(tensors, trained, probe, network.temperature, banned, dtype, network.visual is None)


def write(folder: Path, source: Path, snapshot: Snapshot) -> None:
    """Weights, config, tokenizer and processor files, each tensor read back and compared; in any thread.

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
        _compare_tensors(folder, snapshot)
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


def _compare_tensors(folder: Path, snapshot: Snapshot) -> None:
    files = WeightFiles(folder)
    for name, tensor in snapshot.tensors.items():
        written = float(files.read(name, tuple(tensor.shape), slice(None)).double().abs().sum())
        trained = snapshot.fingerprint[name]
        if abs(written - trained) > 1e-9 * max(1.0, trained):
            raise CheckpointError(
                f"export to {folder}: {name} reads back with sum {written}, trained is {trained}; the disk or "
                "the layout is wrong, do not use this folder"
            )


@torch.no_grad()
def _probe(network: Network, layout: Layout) -> tuple[list[int], Tensor]:
    """A few token ids and their log-probabilities under the trained weights; collective."""
    vocabulary = network.model.config.get_text_config().vocab_size
    allowed = [i for i in range(vocabulary) if network.banned is None or not network.banned[i]]
    ids = [allowed[(7 * i) % len(allowed)] for i in range(_PROBE_TOKENS)]
    tokens = torch.tensor(ids)
    sharded = layout.mesh is not None and network.visual is not None
    places = torch.arange(len(ids) - 1)
    inputs = PackInputs(
        token_ids=tokens[:-1],
        positions=places.expand(3, -1),
        layout=PackLayout((len(places),)),
        sources=places,
        targets=tokens[1:],
        vision=blank_image(network.visual, layout.device) if sharded else None,
        image_index=places[:0],
    )
    logprobs = network(inputs.share(layout.sequence).to(layout.device))[0].cpu()
    reshard(network)
    return ids, logprobs


@torch.no_grad()
def compare_logits(folder: Path, snapshot: Snapshot) -> None:
    """Plain transformers must give the trained log-probabilities from the folder; larger models are left out.

    Not in a background thread: while transformers loads a model it changes this process's default dtype.

    Raises:
        CheckpointError: it gives others.
    """
    if sum(tensor.nbytes for tensor in snapshot.tensors.values()) >= _COMPARE_BELOW_BYTES:
        return
    ids, expected = snapshot.probe
    auto = AutoModelForCausalLM if snapshot.text_only else AutoModelForImageTextToText
    plain = auto.from_pretrained(folder, dtype=snapshot.dtype)
    if any(name.endswith(EXPERT_SUFFIXES) for name in plain.state_dict()):
        plain.set_experts_implementation("eager")  # the default has no kernel for every dtype on CPU
    logits = plain(input_ids=torch.tensor([ids[:-1]])).logits[0].to(expected.dtype) / snapshot.temperature
    if snapshot.banned is not None:
        logits = logits.masked_fill(snapshot.banned, float("-inf"))
    found = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    difference = float((found - expected).abs().mean())
    limit = 0.05 if snapshot.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not difference < limit:
        raise CheckpointError(
            f"export to {folder}: plain transformers gives log-probabilities {difference:.3g} nats away from the "
            f"trained model (allowed {limit}); do not use this folder"
        )
    log.info("export to %s gives the trained model's log-probabilities (mean difference %.2g nats)", folder, difference)
