"""Rollout groups made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from dapo.types import (
    Completion,
    Crashed,
    FinishReason,
    Outcome,
    Prompt,
    Rollout,
    RolloutGroup,
    Scored,
    Truncated,
)

Verdict = bool | None
"""Right, wrong, or a check that failed."""


def prompt(name: str, tokens: int = 3, **more: object) -> Prompt:
    fields = {"images": (), "image_grids": (), "answer": "1", "question": "?"} | more
    return Prompt(id=name, token_ids=tuple(range(tokens)), **fields)  # type: ignore[arg-type]


def group(
    name: str,
    verdicts: Sequence[Verdict],
    *,
    version: int = 0,
    serial: int = 0,
    rewards: Sequence[float | None] | None = None,
    lengths: Sequence[int] | None = None,
    cut: Sequence[int] = (),
    asked: Prompt | None = None,
) -> RolloutGroup:
    """One rollout per verdict; those at the indices in `cut` hit the token limit."""
    rollouts = []
    for sample, verdict in enumerate(verdicts):
        length = lengths[sample] if lengths else 2
        reason = FinishReason.LENGTH if sample in cut else FinishReason.STOP
        outcome: Outcome = Crashed("no verdict")
        if verdict is not None:
            scored = Scored(verdict, format=0.5, extracted="1" if verdict else "2")
            outcome = Truncated(scored) if sample in cut else scored
        completion = Completion(tuple(range(length)), (-0.1,) * length, reason, version)
        rollouts.append(Rollout(name, sample, completion, outcome, f"answer {sample}"))
    if rewards is None:
        rewards = [None if v is None else float(v) for v in verdicts]
    return RolloutGroup(asked or prompt(name), tuple(rollouts), tuple(rewards), serial)
