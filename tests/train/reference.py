"""The same training in one process by plain transformers and torch: every response a row of its own, no packing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dapo.algo.objective import TokenBatch, Totals, policy_objective
from dapo.config.io import validate
from dapo.config.run import RunConfig
from dapo.types import TrainBatch
from tests.model.test_network import plain_logprobs, plain_model
from tests.model.tiny import TinyProcessor, exact_float64


def run_config(tree: dict | None = None, **parallel) -> RunConfig:
    """Small numbers, temperature 0.9, gradients that are clipped, no warm-up."""
    config = {
        "device": "cpu",
        "model": {
            "compute_dtype": "float32",
            "gradient_checkpointing": False,
            "parallel": parallel,
            "optimizer": {"lr": 1e-2, "warmup_updates": 0, "max_grad_norm": 0.5},
        },
        "rollout": {"temperature": 0.9},
        "data": {"max_prompt_tokens": 32},
        "batch": {"max_response_tokens": 16, "tokens_per_pack": 64},
    }
    return validate(_merged(config, tree or {}))


def _merged(base: dict, over: dict) -> dict:
    return base | {k: _merged(base[k], v) if isinstance(v, dict) and k in base else v for k, v in over.items()}


def reference_run(
    folder: Path, kind: str, batch: TrainBatch, config: RunConfig, steps: int = 1
) -> tuple[list, dict[str, Tensor]]:
    """(loss, gradient norm) of each update of the last step and the weights after it, in float64.

    Args:
        steps: how often the batch is trained on.
    """
    model = plain_model(folder, kind, torch.float64)
    processor = TinyProcessor(kind, torch.float64)
    optimizer_config = config.model.optimizer
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    groups: list[list] = [[], []]
    for parameter in model.parameters():
        groups[parameter.dim() <= 1 or id(parameter) in embeddings].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[0], "weight_decay": optimizer_config.weight_decay},
            {"params": groups[1], "weight_decay": 0.0},
        ],
        lr=optimizer_config.lr,
        betas=optimizer_config.betas,
        eps=optimizer_config.eps,
    )

    def logprobs(update: tuple[int, ...]) -> Tensor:
        return torch.cat(
            [
                plain_logprobs(model, processor, batch.groups[g].prompt, s.response_ids)
                for g in update
                for s in batch.groups[g].sequences
            ]
        )

    def step() -> list:
        results = []
        with torch.no_grad():
            old = [logprobs(update) for update in batch.updates]
        for update, before in zip(batch.updates, old, strict=True):
            sequences = [s for g in update for s in batch.groups[g].sequences]
            lengths = torch.tensor([len(s.response_ids) for s in sequences])
            ids = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
            trained = [s.trained for s in sequences]
            tokens = TokenBatch(
                logprobs=logprobs(update),
                old_logprobs=before,
                rollout_logprobs=torch.tensor([x for s in sequences for x in s.rollout_logprobs], dtype=torch.float64),
                advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float64)[ids],
                sequence_ids=ids,
                trained=torch.tensor(trained),
            )
            totals = Totals.of(lengths.tolist(), trained, config.batch.max_response_tokens)
            loss = policy_objective(tokens, config.algorithm, totals).loss
            loss.backward()
            for parameter in model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
            scale = min(1.0, optimizer_config.max_grad_norm / float(norm))
            for parameter in model.parameters():
                parameter.grad *= scale
            optimizer.step()
            optimizer.zero_grad()
            results.append((float(loss.detach()), float(norm)))
        return results

    with exact_float64():
        results = [step() for _ in range(steps)]
    return results[-1], {name: p.detach() for name, p in model.named_parameters()}
