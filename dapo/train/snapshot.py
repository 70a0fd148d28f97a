"""The whole weights at one moment, gathered out of the shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dapo.model.network import Network
from dapo.train import weights
from dapo.train.parallel import RankMesh


@dataclass(frozen=True)
class Snapshot:
    """What rank 0 needs to write an export and to check it, in host memory: nothing of it changes any more."""

    tensors: dict[str, Tensor]
    """Whole weights in the compute dtype, in transformers' names and layout."""
    aliases: dict[str, str]
    """Other names of tied tensors, to the name above."""
    checksums: dict[str, tuple[int, ...]]
    """Of the shards they were gathered from, in the order of their rows."""
    dtype: torch.dtype
    text_only: bool


def take(network: Network, dtype: torch.dtype, ranks: RankMesh) -> Snapshot | None:
    """Gather everything on rank 0 (None on the others); collective, takes as long as a weight sync.

    Gathering needs the training's process group, so it cannot be left to the background. Rank 0's host holds one copy
    of the weights in the compute dtype until it is written.
    """
    model = network.model
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.whole_tensors(model, dtype):
        if ranks.rank == 0:
            tensors[name] = tensor.detach().to("cpu", copy=True)
    checksums = weights.shard_checksums(model, dtype, ranks)
    if ranks.rank:
        return None
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases = {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in tensors
    }
    return Snapshot(tensors, aliases, checksums, dtype, network.visual is None)
