"""The split law with real ranks: two processes, gloo, float64."""

from __future__ import annotations

import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dapo.algo.entropy import logprobs_and_entropy
from dapo.algo.objective import TokenBatch, Totals, merge_sums, policy_objective, reduce_metrics
from dapo.config.algorithm import AggregationName, AlgorithmConfig, CorrectionConfig, KlConfig
from tests.laws.updates import MAX_RESPONSE, MODES

LENGTHS = (5, 1, 8, 3, 0, 7)
TRAINED = (True, True, True, False, True, True)
WIDTH, VOCABULARY = 4, 11
# Rank 0 has one pack of one sequence, rank 1 all the rest in two packs, one of them only masked tokens.
PACKS_OF_RANK = (((0,), ()), ((5, 1, 2, 4), (3,)))


def gradient_of(
    packs: tuple[tuple[int, ...], ...], mode: AggregationName
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradient of a linear policy's weights after the backward passes of some packs."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    weights = normal(WIDTH, VOCABULARY).requires_grad_()
    features = normal(sum(LENGTHS), WIDTH)
    labels = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=draw)
    noise, advantage = normal(3, sum(LENGTHS)), normal(len(LENGTHS))
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
    spans = [torch.arange(a, b) for a, b in pairwise(starts)]
    config = AlgorithmConfig(
        aggregation=mode,
        entropy_coef=0.01,
        kl=KlConfig(loss_coef=0.1),
        correction=CorrectionConfig(kind="truncate", level="sequence"),
    )
    totals = Totals.of(LENGTHS, TRAINED, MAX_RESPONSE)
    sums = []
    for pack in packs:
        index = torch.cat([spans[s] for s in pack]) if pack else torch.arange(0)
        ids = torch.repeat_interleave(
            torch.arange(len(pack)), torch.tensor([LENGTHS[s] for s in pack], dtype=torch.int64)
        )
        logprobs, entropy = logprobs_and_entropy(features[index] @ weights, labels[index], temperature=0.9)
        old, rollout, ref = (logprobs.detach() + 0.2 * noise[i][index] for i in range(3))
        result = policy_objective(
            TokenBatch(
                logprobs=logprobs,
                old_logprobs=old,
                rollout_logprobs=rollout,
                advantages=advantage[list(pack)][ids],
                sequence_ids=ids,
                trained=torch.tensor([TRAINED[s] for s in pack], dtype=torch.bool),
                ref_logprobs=ref,
                entropy=entropy,
            ),
            config,
            totals,
        )
        result.loss.backward()
        sums.append(result.sums)
    assert weights.grad is not None
    return weights.grad, merge_sums(sums)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        results = {}
        for mode in MODES:
            gradient, sums = gradient_of(PACKS_OF_RANK[rank], mode)
            dist.all_reduce(gradient)
            gathered: list[dict[str, torch.Tensor]] = [{}, {}]
            dist.all_gather_object(gathered, sums)
            results[mode] = (gradient, reduce_metrics(merge_sums(gathered)))
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_gloo_ranks_give_the_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    for mode in MODES:
        gradient, sums = gradient_of(((0, 1, 2, 3, 4, 5),), mode)
        assert gradient.abs().max() > 1e-3, "a law about zeros says nothing"
        metrics = reduce_metrics(sums)
        for rank in range(2):
            ranks_gradient, ranks_metrics = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[mode]
            torch.testing.assert_close(ranks_gradient, gradient, rtol=0, atol=1e-12)
            torch.testing.assert_close(ranks_metrics, metrics, rtol=1e-12, atol=1e-12)


def test_sequences_of_every_length_are_in_the_split() -> None:
    assert sorted(s for rank in PACKS_OF_RANK for pack in rank for s in pack) == list(range(len(LENGTHS)))
    assert sys.float_info.epsilon < 1e-12
