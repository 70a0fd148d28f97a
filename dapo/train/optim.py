"""AdamW with decay groups, warm-up by update, clipping by the global norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dapo.config.model import OptimizerConfig
from dapo.train.parallel import RankMesh

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


def make_state(optimizer: torch.optim.AdamW, home: torch.device) -> None:
    """What AdamW makes in its first update, for parameters that have none: moments of zero on `home`, update count 0.

    The count is on the parameter's device, wherever the moments are: the fused update takes it from nowhere else.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: torch.zeros_like(parameter.detach(), device=home) for name in ("exp_avg", "exp_avg_sq")}


def step(optimizer: torch.optim.AdamW, rate: float, home: torch.device, device: torch.device) -> None:
    """One update at this rate; moments live on `home` and are worked on where the weights are (`device`)."""
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
def gradient_square(parameters: list[nn.Parameter], ranks: RankMesh) -> Tensor:
    """Sum of squares of this rank's gradient shards, 0-d; parameters without a gradient get zeros.

    The sum of it over all ranks, over `ranks.shard_copies`, is the square of the global norm.
    """
    for p in parameters:
        if p.grad is None:  # a text-only update: sharded ranks have zeros here, so must a single process
            p.grad = torch.zeros_like(p)
    local = [g for p in parameters if p.grad is not None and (g := _local(p.grad)).numel()]
    return torch.stack(torch._foreach_norm(local or [torch.zeros(1, device=ranks.device)])).square().sum()


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale gradients of this global norm down to `max_norm`, if they are above it."""
    if max_norm < norm < float("inf"):
        torch._foreach_mul_([_local(p.grad) for p in parameters if p.grad is not None], max_norm / norm)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
