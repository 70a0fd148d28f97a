"""Group-relative advantage: how much better a response is than its siblings. No critic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]

EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], kind: AdvantageKind, *, epsilon: float = EPSILON) -> list[float]:
    """Advantage of each of the G responses to one prompt.

    ``grpo``: (R_i - mean) / (std + epsilon), std with G - 1 (GRPO, arXiv 2402.03300; DAPO, equation 9).
    ``dr_grpo``: R_i - mean (arXiv 2503.20783). ``rloo``: R_i - mean of the others, which is dr_grpo times G / (G - 1)
    (arXiv 2402.14740). A response without siblings is its own measure: mean 0, std 1.

    Args:
        rewards: the sum of each response's reward parts; finite.
        epsilon: keeps the division finite; in reward units.

    Returns:
        One float64 per response. Equal rewards give exactly 0; in float32 the usual formula makes -0.056 of eight
        rewards of 0.9, and in float64 it still makes noise of six rewards of 0.1.

    Raises:
        ValueError: a reward is NaN or infinite.
    """
    if not all(map(math.isfinite, rewards)):
        raise ValueError(f"a reward is not finite, which would spoil its whole group: {list(rewards)}")
    size = len(rewards)
    if size == 1:
        return [rewards[0] / (1 + epsilon) if kind == "grpo" else rewards[0]]
    if size == 0 or min(rewards) == max(rewards):
        return [0.0] * size
    mean = math.fsum(rewards) / size
    centred = [r - mean for r in rewards]
    match kind:
        case "grpo":
            std = math.sqrt(math.fsum(c * c for c in centred) / (size - 1))
            return [c / (std + epsilon) for c in centred]
        case "dr_grpo":
            return centred
        case "rloo":
            return [c * size / (size - 1) for c in centred]
