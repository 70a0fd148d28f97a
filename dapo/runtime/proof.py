"""The log-prob probe: engine and trainer must give the same tokens the same probability, after every kind of sync.

A fingerprint shows that tensors arrived; only this shows that the engine computes with them (transposed experts, stale
image features, skipped repacking and another temperature all pass a fingerprint).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dapo.plan.packing import plan_packs
from dapo.rollout.verification import ProbeGap, probe_gap
from dapo.train.policy import Policy
from dapo.types import Completion, Prompt, SamplingParams, TrainBatch, TrainGroup, TrainSequence


class Generates(Protocol):
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]: ...


def probe(
    engine: Generates,
    policy: Policy,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    ranks: int,
    tokens_per_pack: int,
) -> ProbeGap:
    """Sample from the engine as in training, and compare its log-probabilities with the trainer's current ones.

    Args:
        prompts: few and fixed, with images where the run has any.
        params: the training's own, so that temperature and banned ids are compared too.
    """
    groups = tuple(
        TrainGroup(prompt, tuple(TrainSequence(c.token_ids, 0.0, c.logprobs, c.experts) for c in completions))
        for prompt, completions in zip(prompts, engine.generate(prompts, params), strict=True)
    )
    batch = TrainBatch(groups, (tuple(range(len(groups))),), policy_version=0)
    trainer = policy.logprobs(batch, plan_packs(batch, ranks=ranks, tokens_per_pack=tokens_per_pack))
    sampled = [sequence.rollout_logprobs for group in groups for sequence in group.sequences]
    return probe_gap(sampled, [values for group in trainer.values for values in group])
