"""AdamW with decay groups, warm-up by update, clipping by the global norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dapo.config.model import OptimizerConfig
from dapo.train.parallel import Layout

STREAM_BYTES = 2**30
"""Moments on the device at a time where the optimiser's state lives in host memory."""


def make_optimizer(model: nn.Module, config: OptimizerConfig, *, streamed: bool = False) -> torch.optim.AdamW:
    """Weight decay on matrices only: not on norms, biases and embeddings (a tied head is an embedding).

    Args:
        streamed: groups small enough for `step` to bring their moments to the device one after the other.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in embeddings]
    rest = [p for p in trained if p.dim() <= 1 or id(p) in embeddings]
    groups = [(decayed, config.weight_decay), (rest, 0.0)]
    if streamed:
        groups = [(part, decay) for parameters, decay in groups for part in _parts(parameters)]
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def step(optimizer: torch.optim.AdamW, rate: float, home: torch.device, device: torch.device) -> None:
    """One update at this rate; moments live on `home` and are worked on where the weights are."""
    groups = optimizer.param_groups
    for group in groups:
        group["lr"] = rate
    if home == device:
        optimizer.step()
        return
    for group in groups:
        _move_moments(optimizer, group["params"], device)
        optimizer.param_groups = [group]
        optimizer.step()
        _move_moments(optimizer, group["params"], home)
    optimizer.param_groups = groups


def _move_moments(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], device: torch.device) -> None:
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for name in [name for name in state if name != "step"]:
            state[name] = state[name].to(device)


def _parts(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    parts: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        bytes_here = 2 * _local(parameter.detach()).nbytes
        if not parts or size + bytes_here > STREAM_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(parameter)
        size += bytes_here
    return parts


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """Rate of optimiser update 1, 2, ...: linear from 0, reached in update `warmup_updates`, then constant."""
    return config.lr * min(1.0, update / config.warmup_updates) if config.warmup_updates else config.lr


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float, layout: Layout) -> float:
    """Scale all gradients so that their global norm is at most `max_norm`; parameters without one get zeros.

    Returns:
        The norm before clipping, over all shards of all ranks. Not finite: gradients are left as they are.
    """
    for p in parameters:
        if p.grad is None:  # a text-only update: sharded ranks have zeros here, so must a single process
            p.grad = torch.zeros_like(p)
    local = [_local(p.grad) for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([g for g in local if g.numel()] or [torch.zeros(1, device=layout.device)]))
    squares = norms.to("cpu", torch.float64).square().sum()
    norm = float((layout.sum(squares) / layout.shard_copies).sqrt())
    if max_norm < norm < float("inf"):
        torch._foreach_mul_(local, max_norm / norm)
    return norm


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
