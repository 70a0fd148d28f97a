"""A step's records as the numbers that are logged. Every name is documented in docs/metrics.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

from dapo.algo.groups import SamplingReport, Stage
from dapo.types import RolloutGroup

# Of these one number of the updates is the step's; all others are means weighted by the updates' trained tokens.
_SUMMED = ("tokens", "empty_update", "skipped")
_OF_FIRST_UPDATE = ("max_ratio_error",)
_OF_LAST_UPDATE = ("lr",)


def step_metrics(
    groups: Sequence[RolloutGroup], updates: Sequence[Mapping[str, float]], sampling: SamplingReport, responses: int
) -> dict[str, float]:
    """All metrics of one step but times and weights' transfer.

    Args:
        groups: those the step trained on.
        updates: `UpdateResult.metrics` of its updates, in order.
        responses: generated for training since the run began.
    """
    return {
        **reward_metrics(groups),
        **response_metrics(groups),
        **_sampling_metrics(sampling, sum(len(g.rollouts) for g in groups), responses),
        **update_metrics(updates),
    }


def reward_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Rewards and their parts over responses whose check came to a verdict."""
    rollouts = [r for g in groups for r in g.rollouts]
    rewards = [reward for g in groups for reward in g.rewards if reward is not None]
    scored = [parts for r in rollouts if (parts := r.scored) is not None]
    spread = describe(rewards)
    return {
        "reward/mean": spread["mean"],
        "reward/max": spread["max"],
        "reward/min": spread["min"],
        "reward/accuracy": describe([float(s.accuracy) for s in scored])["mean"],
        "reward/format": describe([s.format for s in scored])["mean"],
        "reward/overlong": describe([s.overlong for s in scored])["mean"],
        "reward/failed": (len(rollouts) - len(scored)) / max(len(rollouts), 1),
    }


def response_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Lengths in tokens, and the share of responses that hit the limit."""
    rollouts = [r for g in groups for r in g.rollouts]
    lengths = describe([r.length for r in rollouts])
    return {
        "response/length_mean": lengths["mean"],
        "response/length_max": lengths["max"],
        "response/length_min": lengths["min"],
        "response/truncated": sum(r.truncated for r in rollouts) / max(len(rollouts), 1),
        "response/prompt_length_mean": describe([len(g.prompt.token_ids) for g in groups])["mean"],
    }


def _sampling_metrics(sampling: SamplingReport, trained_responses: int, responses: int) -> dict[str, float]:
    counts = {f"groups/{verdict.value}": count for verdict, count in sampling.verdicts.items()}
    # A step filled by carried-over groups alone has generated nothing to measure.
    means = {"groups/accuracy": sampling.accuracy, "groups/reward": sampling.reward}
    return {
        **counts,
        **{f"outcomes/{kind}": count for kind, count in sampling.outcomes.items()},
        **{name: value for name, value in means.items() if not math.isnan(value)},
        "groups/generated": sampling.generated,
        "groups/skipped": sampling.skipped,
        "groups/trained": sampling.taken,
        "groups/rounds": sampling.rounds,
        "groups/carried_in": sampling.carried_in,
        "groups/expired": sampling.expired,
        "groups/dropped": sampling.dropped,
        "groups/waiting": sampling.waiting,
        "groups/keep_rate": sampling.keep_rate,
        "groups/stage": list(Stage).index(sampling.stage),
        "groups/starved": float(sampling.stage in (Stage.SMALLER_STEP, Stage.STOP)),
        "groups/responses_per_trained": sampling.responses / max(trained_responses, 1),
        "groups/responses_total": responses,
    }


def update_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The updates of a step as one: `train/...`, and `engine/...` for the gap between engine and trainer."""
    weights = [update.get("tokens", 1.0) for update in updates]
    metrics = {}
    for name in dict.fromkeys(chain.from_iterable(updates)):
        having = [(u[name], w) for u, w in zip(updates, weights, strict=True) if name in u]
        values = [value for value, _ in having]
        if name in _SUMMED:
            value = math.fsum(values)
        elif name in _OF_FIRST_UPDATE:
            value = values[0]
        elif name in _OF_LAST_UPDATE:
            value = values[-1]
        else:
            value = _weighted_mean(having)
        group = "engine" if name.startswith("gap_") else "train"
        metrics[f"{group}/{name}"] = value
    return metrics


def speed_metrics(groups: Sequence[RolloutGroup], seconds: Mapping[str, float], devices: int) -> dict[str, float]:
    """How fast the step was.

    Args:
        seconds: per phase of the step, and `step` for all of it.

    Returns:
        `time/tokens_per_device_s`: prompt and response tokens trained on, per second and device;
        `time/ms_per_token/<phase>`: for `generate` per response token, else per token of both.
    """
    written = sum(r.length for g in groups for r in g.rollouts)
    tokens = written + sum(len(g.prompt.token_ids) * len(g.rollouts) for g in groups)
    metrics = {"time/tokens_per_device_s": tokens / (seconds["step"] * devices)}
    for name, spent in seconds.items():
        per = written if name == "generate" else tokens
        if name != "step":
            metrics[f"time/ms_per_token/{name}"] = 1000 * spent / per if per else 0.0
    return metrics


def describe(values: Sequence[float]) -> dict[str, float]:
    """Mean (float64), max and min; NaN of nothing."""
    if not values:
        return dict.fromkeys(("mean", "max", "min"), math.nan)
    return {"mean": math.fsum(values) / len(values), "max": float(max(values)), "min": float(min(values))}


def _weighted_mean(having: Sequence[tuple[float, float]]) -> float:
    total = math.fsum(weight for _, weight in having)
    if not total:
        return math.fsum(value for value, _ in having) / len(having)
    return math.fsum(value * weight for value, weight in having) / total
