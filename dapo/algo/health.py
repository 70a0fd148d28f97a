"""Alarms from a step's metrics, each with its likely reasons.

Alarms never stop a run. An alarm is raised when its condition begins, and again only after the condition was gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapo.config.algorithm import AlarmConfig

Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something to look at."""

    name: str
    step: int
    message: str
    """What was seen, the limit, likely reasons, what to try."""


class Health:
    """Watches the metrics of every step (names of docs/metrics.md; an absent metric raises nothing)."""

    def __init__(self, config: AlarmConfig) -> None:
        self.config = config
        self._ringing: set[str] = set()
        self._rewards: list[float] = []
        self._accuracies: list[float] = []

    def observe(self, step: int, metrics: Metrics) -> list[Alarm]:
        """The alarms whose condition begins with this step."""
        if "groups/reward" in metrics and "groups/accuracy" in metrics:
            # Over all that was generated: among the groups trained on, the filter holds accuracy near a half.
            self._rewards = [*self._rewards, metrics["groups/reward"]][-self.config.window :]
            self._accuracies = [*self._accuracies, metrics["groups/accuracy"]][-self.config.window :]
        alarms = []
        for name, check in self._checks().items():
            message = check(metrics)
            if message and name not in self._ringing:
                alarms.append(Alarm(name, step, message))
            (self._ringing.add if message else self._ringing.discard)(name)
        return alarms

    def state_dict(self) -> dict[str, Any]:
        """Everything but the configuration, as plain JSON values."""
        return {"ringing": sorted(self._ringing), "rewards": self._rewards, "accuracies": self._accuracies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ringing = set(state["ringing"])
        self._rewards, self._accuracies = list(state["rewards"]), list(state["accuracies"])

    def _checks(self) -> dict[str, Callable[[Metrics], str | None]]:
        return {
            "not_finite": _not_finite,
            "entropy_collapse": self._entropy_collapse,
            "reward_without_accuracy": self._reward_without_accuracy,
            "gap_too_large": self._gap_too_large,
            "clipped_probability_too_high": self._clipped_probability_too_high,
            "starvation": _starvation,
            "nothing_trained": _nothing_trained,
        }

    def _entropy_collapse(self, metrics: Metrics) -> str | None:
        entropy, limit = metrics.get("train/entropy", math.inf), self.config.min_entropy
        if entropy >= limit or math.isnan(entropy):
            return None
        return (
            f"entropy is {entropy:.4g} nats per token, below {limit:g}: the policy hardly explores, and groups will "
            "agree with themselves. Raise algorithm.loss.clip.high, lower the learning rate, or look at clip_cov/kl_cov"
        )

    def _gap_too_large(self, metrics: Metrics) -> str | None:
        gap, limit = metrics.get("engine/gap_mean", 0.0), self.config.max_gap
        if not gap > limit:
            return None
        return (
            f"engine and trainer differ by {gap:.4g} nats per token on average, more than {limit:g}: stale weights in "
            "the engine, another precision or another softmax (temperature, banned ids). Compare the log-prob probe; "
            "algorithm.correction.kind=truncate bounds the damage meanwhile"
        )

    def _clipped_probability_too_high(self, metrics: Metrics) -> str | None:
        probability, limit = metrics.get("train/clipped_probability", 0.0), self.config.max_clipped_probability
        if not probability > limit:
            return None
        return (
            f"tokens clipped from above have a mean probability of {probability:.3g}, above {limit:g}: clipping now "
            "holds back likely tokens too, not only exploration (DAPO section 3.1). Lower the learning rate or take "
            "fewer updates per step"
        )

    def _reward_without_accuracy(self, metrics: Metrics) -> str | None:
        half = self.config.window // 2
        if len(self._rewards) < self.config.window:
            return None
        rise, error = _change(self._rewards, half)
        gained, noise = _change(self._accuracies, half)
        # Twice its standard error: a rise by chance alone in about one window of 40.
        if not (rise > 2 * error and gained <= noise):
            return None
        return (
            f"over {self.config.window} steps the reward rose by {rise:.3g} and accuracy changed by {gained:.3g}: the "
            "policy is paid for something else (format, length, or a hole in the grader). Read the samples"
        )


def _change(values: Sequence[float], half: int) -> tuple[float, float]:
    """Mean of the last `half` minus mean of the first, and its standard error."""
    first, last = values[:half], values[-half:]
    means = math.fsum(first) / half, math.fsum(last) / half
    squares = sum((v - m) ** 2 for part, m in zip((first, last), means, strict=True) for v in part)
    variance = squares / (2 * half - 2) if half > 1 else 0.0
    return means[1] - means[0], math.sqrt(2 * variance / half)


def _not_finite(metrics: Metrics) -> str | None:
    # Elsewhere NaN only means that there was nothing to measure.
    names = sorted(
        n for n, value in metrics.items() if n.startswith(("train/", "engine/")) and not math.isfinite(value)
    )
    return f"not finite: {', '.join(names)}. Replay the step from its recording" if names else None


def _starvation(metrics: Metrics) -> str | None:
    if not metrics.get("groups/starved", 0.0):
        return None
    counts = ", ".join(
        f"{metrics[f'groups/{reason}']:.0f} {reason.replace('_', ' ')}"
        for reason in ("kept", "all_right", "all_wrong", "truncated", "failed")
        if f"groups/{reason}" in metrics
    )
    return (
        f"the step trained on {metrics.get('groups/trained', math.nan):.0f} groups, fewer than a step has: {counts}. "
        "Much all right: harder data; all wrong: easier data or more warm-up; truncated: a longer response limit; "
        "failed: `dapo reward test`"
    )


def _nothing_trained(metrics: Metrics) -> str | None:
    if not metrics.get("train/empty_update", 0.0):
        return None
    return (
        "an update had no token to train on: all its responses were masked (algorithm.overlong.filter_truncated, "
        "failed checks), so its gradient was zero. Raise batch.max_response_tokens, or look at the failed checks"
    )
