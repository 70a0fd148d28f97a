"""Who holds which shard: process group, mesh, FSDP2 per block. Nothing outside this package sees it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from dapo.config.model import ParallelConfig
from dapo.device import BACKENDS, Kind
from dapo.errors import ConfigError
from dapo.model.network import Network
from dapo.model.ulysses import SequenceGroup

log = logging.getLogger(__name__)

MIN_GROUP_BYTES = 2**24
"""Weights below this are gathered together with others: waiting for a collective would take longer than moving them."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A rank that waits longer for the others raises, naming the collective: a hang never lasts for ever."""


@dataclass(frozen=True)
class RankMesh:
    """This rank's place among all training processes, and their device mesh."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None
    """None: one process, no sharding and no process group."""
    sequence: SequenceGroup | None = None
    """The ranks that share each pack with this one."""

    @property
    def sequence_parallel(self) -> int:
        return 1 if self.sequence is None else self.sequence.size

    @property
    def data_rank(self) -> int:
        """Whose packs of the plan this rank computes; the ranks of a sequence-parallel group share them."""
        return self.rank // self.sequence_parallel

    @property
    def replicated(self) -> bool:
        return self.mesh is not None and self.mesh.ndim == 2

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over all ranks, float64, on CPU (HCCL has no float64)."""
        total = values.detach().cpu().double()
        if self.mesh is not None and self.world > 1:
            dist.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """A few numbers [n] of every rank: [world, n], float64, on CPU."""
        own = values.detach().cpu().double()
        if self.mesh is None or self.world == 1:
            return own[None]
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own)
        return torch.stack(parts)

    @property
    def shard_copies(self) -> int:
        """Ranks that hold the same shard: sums over all ranks count it so often."""
        if self.mesh is None:
            return 1
        return self.mesh.size(0) if self.replicated else 1


def join(config: ParallelConfig, kind: Kind, device: torch.device, rank: int, world: int, mixed: bool) -> RankMesh:
    """Join the process group (address and port from the environment) and build the mesh.

    Args:
        mixed: compute dtype and master dtype differ; then even one process is sharded, for the casts FSDP does. So
            it is with offloaded parameters, for the moves.

    Raises:
        ConfigError: the configured sizes do not fit the number of processes.
    """
    if world != config.world_size:
        raise ConfigError(f"model.parallel.world_size={config.world_size}, but {world} training processes were started")
    if world == 1 and not mixed and not config.offload_parameters:
        return RankMesh(rank, world, device, None)
    if not dist.is_initialized():
        store = dist.HashStore() if world == 1 else None
        dist.init_process_group(BACKENDS[kind], rank=rank, world_size=world, store=store, timeout=COLLECTIVE_TIMEOUT)
    fsdp = config.fsdp_size or world
    if world % fsdp:
        raise ConfigError(f"model.parallel.fsdp_size={fsdp} must divide model.parallel.world_size={world}")
    if fsdp == world:
        mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    else:
        if rank == 0:
            log.warning(
                "model.parallel.fsdp_size=%d is smaller than world_size=%d: HSDP, %d full copies of the weights and of "
                "the optimiser state, each over %d ranks",
                fsdp,
                world,
                world // fsdp,
                fsdp,
            )
        mesh = init_device_mesh(kind, (world // fsdp, fsdp), mesh_dim_names=("replicate", "shard"))
    return RankMesh(rank, world, device, mesh, _sequence_group(config.sequence_parallel, kind, rank, world))


def _sequence_group(size: int, kind: Kind, rank: int, world: int) -> SequenceGroup | None:
    """Neighbouring ranks: they exchange most, and neighbours sit in one machine."""
    if size == 1:
        return None
    mesh = init_device_mesh(kind, (world // size, size), mesh_dim_names=("data", "sequence"))
    return SequenceGroup(mesh.get_group("sequence"), rank % size, size)


def shard_network(
    network: Network, ranks: RankMesh, compute_dtype: torch.dtype, *, reshard_after_forward: bool, offload: bool
) -> None:
    """FSDP2 for each block, for the vision tower and for what is left (embeddings, norm, head); sums gradients.

    Blocks too small to be worth a collective of their own are sharded together with what is left.

    Args:
        offload: the shards live in host memory, and so do their gradients.
    """
    if ranks.mesh is None:
        return
    first = next(network.parameters())
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == first.dtype else compute_dtype, reduce_dtype=first.dtype
    )
    options: dict[str, Any] = {"mesh": ranks.mesh, "mp_policy": policy}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type != "cpu")
    text: Any = network.text
    visual: Any = network.visual
    towers = [] if visual is None else [*visual.blocks, visual]
    for module in [*text.layers, *towers]:
        if sum(p.numel() for p in module.parameters()) * compute_dtype.itemsize >= MIN_GROUP_BYTES:
            fully_shard(module, reshard_after_forward=reshard_after_forward, **options)
    # The root's weights are used at both ends of the pass.
    fully_shard(network, reshard_after_forward=False, **options)
    for module in sharded_modules(network):
        # Losses are normalised by global counts already, so gradients are added up, not averaged.
        module.set_gradient_divide_factor(1.0)
        if ranks.device.type != "cuda":
            module.set_force_sum_reduction_for_comms(True)  # gloo and HCCL have no premultiplied sum


def announce_backward(network: Network, ranks: RankMesh, *, last: bool) -> None:
    """Before each pack's backward pass: whether it is the update's last.

    A model sharded in one piece keeps its weights and gradients whole until then: one gather and one reduction per
    update. A larger one reduces after every pass, because whole gradients would not fit.
    """
    if ranks.mesh is None:
        return
    root: Any = network
    root.set_is_last_backward(last)
    if len(sharded_modules(network)) == 1:
        root.set_requires_gradient_sync(last)
        root.set_reshard_after_backward(last)
    elif ranks.replicated:
        root.set_requires_all_reduce(last)


def sharded_modules(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def reshard(network: nn.Module) -> None:
    """After a forward pass without a backward: the root's weights are still whole, and no longer shards to sum over."""
    for module in sharded_modules(network):
        module.reshard()


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
