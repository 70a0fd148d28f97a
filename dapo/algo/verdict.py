"""The verdict of dynamic sampling on a group (DAPO section 3.2, equation 11): 0 < #correct < G, or why not."""

from __future__ import annotations

import enum

from dapo.types import RolloutGroup


class Verdict(enum.StrEnum):
    """Whether a group is kept, and why not."""

    KEPT = "kept"
    ALL_RIGHT = "all_right"
    ALL_WRONG = "all_wrong"
    TRUNCATED = "truncated"
    """No answer is right and at least half of the responses hit the token limit: the limit is the likelier reason."""
    FAILED = "failed"
    """Fewer than two checks came to a verdict."""


def classify(group: RolloutGroup, metric: str = "accuracy") -> Verdict:
    """Decide on a group by its verdicts on accuracy (booleans, so that no rounding can make a difference).

    A failed check is no verdict: it is neither right nor wrong, and the group is judged by its other responses. Right
    and wrong among them: kept (the failed ones are masked out of the loss). With fewer than two verdicts: `FAILED`.

    Args:
        metric: `reward` keeps a group iff its judged responses differ in reward, whatever their accuracy.
    """
    judged = [i for i, r in enumerate(group.rollouts) if not r.failed]
    if len(judged) < min(2, len(group.rollouts)):
        return Verdict.FAILED
    right = sum(group.rollouts[i].correct for i in judged)
    differs = 0 < right < len(judged)
    if metric == "reward":
        differs = len({group.rewards[i] for i in judged}) > 1
    if differs:
        return Verdict.KEPT
    if right:
        return Verdict.ALL_RIGHT
    cut = sum(group.rollouts[i].truncated for i in judged)
    return Verdict.TRUNCATED if 2 * cut >= len(judged) else Verdict.ALL_WRONG
