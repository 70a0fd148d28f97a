"""Random updates for the laws: whole sequences with log-probabilities, advantages and masks, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dapo.algo.objective import ObjectiveResult, TokenBatch, Totals, merge_sums, policy_objective
from dapo.config.algorithm import (
    AggregationName,
    AlgorithmConfig,
    CispoLossConfig,
    ClipConfig,
    CorrectionConfig,
    DapoLossConfig,
    GspoLossConfig,
    KlConfig,
)

MODES: tuple[AggregationName, ...] = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "token-sum",
)
LOSSES = (
    DapoLossConfig(),
    DapoLossConfig(clip=ClipConfig(low=0.1, high=0.1, dual=None)),
    GspoLossConfig(clip=ClipConfig(low=0.1, high=0.15, dual=3.0)),
    CispoLossConfig(low=0.5, high=0.5),
)
MAX_RESPONSE = 8


def update(lengths: list[int], trained: list[bool], seed: int) -> TokenBatch:
    """An update of these sequences; the gradient of `logprobs` and `entropy` is what the laws look at."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(count, generator=generator, dtype=torch.float64)

    old = -normal(1.0).abs()
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    advantage = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return TokenBatch(
        logprobs=(old + normal(0.3)).requires_grad_(),
        old_logprobs=old,
        rollout_logprobs=old + normal(0.3),
        advantages=advantage[ids],
        sequence_ids=ids,
        trained=torch.tensor(trained, dtype=torch.bool),
        ref_logprobs=old + normal(0.5),
        entropy=normal(1.0).abs().requires_grad_(),
    )


def totals_of(batch: TokenBatch) -> Totals:
    lengths = torch.bincount(batch.sequence_ids, minlength=batch.trained.numel())
    return Totals.of(lengths.tolist(), batch.trained.tolist(), MAX_RESPONSE)


def pick(batch: TokenBatch, sequences: list[int]) -> TokenBatch:
    """A pack of some sequences, renumbered; gradients flow back to the whole update."""
    where = torch.cat([(batch.sequence_ids == s).nonzero().flatten() for s in sequences]) if sequences else []
    index = torch.as_tensor(where, dtype=torch.int64)
    renumbered = torch.tensor([sequences.index(int(s)) for s in batch.sequence_ids[index]], dtype=torch.int64)
    parts: dict[str, Any] = {
        name: getattr(batch, name)[index]
        for name in ("logprobs", "old_logprobs", "rollout_logprobs", "advantages", "ref_logprobs", "entropy")
    }
    trained = batch.trained[torch.tensor(sequences, dtype=torch.int64)]
    return replace(batch, **parts, sequence_ids=renumbered, trained=trained)


def gradients(
    batch: TokenBatch, packs: list[list[int]], config: AlgorithmConfig, totals: Totals
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One backward per pack: (gradient of log-probabilities, of entropies, merged sums)."""
    assert batch.entropy is not None
    batch.logprobs.grad = batch.entropy.grad = None
    results: list[ObjectiveResult] = []
    for pack in packs:
        results.append(policy_objective(pick(batch, pack), config, totals))
        results[-1].loss.backward()
    zeros = torch.zeros_like(batch.logprobs)
    grads = [zeros if x.grad is None else x.grad.clone() for x in (batch.logprobs, batch.entropy)]
    return grads[0], grads[1], merge_sums(result.sums for result in results)


@st.composite
def configs(draw: st.DrawFn) -> AlgorithmConfig:
    """All of the algorithm that is linear in sequences."""
    loss = draw(st.sampled_from(LOSSES))
    modes = [mode for mode in MODES if not (loss.kind == "gspo" and mode == "token-sum")]
    return AlgorithmConfig(
        loss=loss,
        aggregation=draw(st.sampled_from(modes)),
        entropy_coef=draw(st.sampled_from([0.0, 0.02])),
        kl=KlConfig(
            loss_coef=draw(st.sampled_from([0.0, 0.1])), kind=draw(st.sampled_from(["k1", "k2", "k3", "abs", "k3+"]))
        ),
        correction=CorrectionConfig(
            kind=draw(st.sampled_from(["off", "truncate", "mask"])), level=draw(st.sampled_from(["token", "sequence"]))
        ),
    )


@st.composite
def updates(draw: st.DrawFn) -> TokenBatch:
    lengths = draw(st.lists(st.integers(0, MAX_RESPONSE), min_size=1, max_size=8))
    trained = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    return update(lengths, trained, draw(st.integers(0, 2**31)))
