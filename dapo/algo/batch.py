"""From graded groups to the input of the loss: rewards, KL in reward, advantages, masks. Plain numbers in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dapo.algo.advantage import group_advantages
from dapo.algo.kl import kl_per_token
from dapo.algo.overlong import soft_overlong_penalty
from dapo.config.algorithm import AlgorithmConfig, KlKind
from dapo.config.run import RunConfig
from dapo.types import Outcome, Rollout, RolloutGroup, Scored, TrainBatch, TrainGroup, TrainSequence, Truncated


def with_rewards(group: RolloutGroup, config: RunConfig) -> RolloutGroup:
    """Complete the outcomes (truncation, soft overlong punishment) and combine their parts into rewards."""
    rollouts = tuple(replace(r, outcome=_complete(r, config)) for r in group.rollouts)
    return replace(group, rollouts=rollouts, rewards=tuple(_reward(r.outcome, config) for r in rollouts))


def _complete(rollout: Rollout, config: RunConfig) -> Outcome:
    outcome, overlong = rollout.outcome, config.algorithm.overlong
    if not isinstance(outcome, Scored):
        return outcome
    if overlong.soft_punishment:
        penalty = soft_overlong_penalty(
            rollout.length,
            max_length=config.batch.max_response_tokens,
            buffer=overlong.buffer_tokens,
            factor=overlong.factor,
        )
        outcome = replace(outcome, overlong=penalty)
    return Truncated(outcome) if rollout.truncated else outcome


def _reward(outcome: Outcome, config: RunConfig) -> float | None:
    """Weighted sum of the parts; None where the check failed: no verdict is not a zero."""
    scored = outcome.scored if isinstance(outcome, Truncated) else outcome
    if not isinstance(scored, Scored):
        return None
    weights = config.reward
    return weights.accuracy_weight * scored.accuracy + weights.format_weight * scored.format + scored.overlong


def build_train_batch(
    groups: Sequence[RolloutGroup], config: AlgorithmConfig, prompts_per_update: int, policy_version: int
) -> TrainBatch:
    """Advantages within each group and masks; updates are consecutive runs of `prompts_per_update` groups.

    Responses without a verdict take no part in the group's mean and are not trained on. A short step (starvation)
    makes fewer updates, the last of them smaller.
    """
    train_groups = tuple(_train_group(group, config) for group in groups)
    order = range(len(groups))
    updates = tuple(tuple(order[i : i + prompts_per_update]) for i in range(0, len(groups), prompts_per_update))
    return TrainBatch(train_groups, updates, policy_version)


def _train_group(group: RolloutGroup, config: AlgorithmConfig) -> TrainGroup:
    advantages = iter(group_advantages([r for r in group.rewards if r is not None], kind=config.advantage))
    sequences = []
    for rollout, reward in zip(group.rollouts, group.rewards, strict=True):
        filtered = config.overlong.filter_truncated and rollout.truncated
        sequences.append(
            TrainSequence(
                response_ids=rollout.completion.token_ids,
                advantage=0.0 if reward is None else next(advantages),
                rollout_logprobs=rollout.completion.logprobs,
                experts=rollout.completion.experts,
                trained=reward is not None and not filtered,
            )
        )
    return TrainGroup(group.prompt, tuple(sequences))


def subtract_kl(
    groups: Sequence[RolloutGroup],
    old: Sequence[Sequence[Sequence[float]]],
    reference: Sequence[Sequence[Sequence[float]]],
    coef: float,
    kind: KlKind,
) -> tuple[list[RolloutGroup], float]:
    """KL in reward: each reward minus coef times the sum over its tokens of the KL estimate.

    Args:
        old, reference: log-probabilities per group, sequence and token (nats).

    Returns:
        The groups with new rewards, and the mean over responses of the mean KL per token (for the adaptive controller).
    """
    penalised, means = [], []
    for group, old_group, reference_group in zip(groups, old, reference, strict=True):
        rewards: list[float | None] = []
        for reward, a, b in zip(group.rewards, old_group, reference_group, strict=True):
            tokens = kl_per_token(a, b, kind)
            means.append(sum(tokens) / max(len(tokens), 1))
            rewards.append(None if reward is None else reward - coef * sum(tokens))
        penalised.append(replace(group, rewards=tuple(rewards)))
    return penalised, sum(means) / max(len(means), 1)
