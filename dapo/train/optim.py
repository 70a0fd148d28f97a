"""AdamW with decay groups, warm-up by update, clipping by the global norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dapo.config.model import OptimizerConfig
from dapo.train.parallel import Layout


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only: not on norms, biases and embeddings (a tied head is an embedding)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in embeddings]
    rest = [p for p in trained if p.dim() <= 1 or id(p) in embeddings]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


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
