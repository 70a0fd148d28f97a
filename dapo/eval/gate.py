"""The promotion gate: may the challenger take the champion's place? A pure function of two sets of verdicts.

Both must have answered the same held-out prompts with the same decoding. A difference that may be chance does not
promote, and a gain does not pay for a regression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from dapo.config.base import Frozen
from dapo.errors import DataError
from dapo.eval.estimate import Interval
from dapo.eval.paired import PairedSlice, paired
from dapo.eval.results import PromptResult, Results, numbers

Share = Annotated[float, Field(ge=0, le=1)]


class GateConfig(Frozen):
    """What a challenger must show. Shares are between 0 and 1; a limit of null is not checked."""

    min_gain: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """The 95 % interval of the accuracy difference must lie above it. 0: better than chance explains; a negative
    value lets an equal model pass (non-inferiority)."""
    max_length_growth: Annotated[float, Field(gt=0)] | None = 1.5
    """Mean response length at most so many times the champion's."""
    max_format_loss: Share | None = 0.02
    """Format score may fall by so much."""
    max_truncated_gain: Share | None = 0.02
    """Share of truncated responses may rise by so much."""
    max_slice_loss: Share | None = 0.05
    """No slice may lose more accuracy than this, where the loss is more than chance (its interval lies below 0)."""
    min_slice_prompts: Annotated[int, Field(ge=1)] = 20
    """Smaller slices are shown, not judged."""
    max_failed: Share = 0.02
    """Share of failed checks on either side, above which the comparison is not valid."""
    min_prompts: Annotated[int, Field(ge=1)] = 30
    """Fewer prompts in common decide nothing."""


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One condition and how it came out."""

    name: str
    passed: bool
    reason: str
    """One sentence with the numbers."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The gate's decision, with everything it is based on."""

    promote: bool
    checks: tuple[GateCheck, ...]
    difference: Interval
    """Accuracy, challenger minus champion, paired over prompts."""
    champion: dict[str, float]
    challenger: dict[str, float]
    slices: tuple[PairedSlice, ...]
    """The champion is the baseline."""
    gate: GateConfig

    @property
    def reasons(self) -> list[str]:
        """Why not, or why: the failed conditions, else the first one."""
        return [c.reason for c in self.checks if not c.passed] or [self.checks[0].reason]

    def plain(self) -> dict[str, Any]:
        """For JSON; everything but NaN, which JSON has not."""
        record = {
            "promote": self.promote,
            "reasons": self.reasons,
            "difference": asdict(self.difference),
            "champion": self.champion,
            "challenger": self.challenger,
            "checks": [asdict(check) for check in self.checks],
            "slices": [_plain(one) for one in self.slices],
            "gate": self.gate.model_dump(mode="json"),
        }
        return dict(_without_nan(record))


def decide(champion: Results, challenger: Results, gate: GateConfig) -> Decision:
    """Compare two models' verdicts on the same prompts.

    Prompts on which either side has no verdict (every check failed) are left out of the difference, and bounded by
    `max_failed`.

    Raises:
        DataError: the two did not answer the same prompts the same number of times.
    """
    _same_questions(champion, challenger)
    pair = paired(challenger, champion)
    if pair is None:
        raise DataError("no prompt has a verdict on both sides: the reward function failed on all; see the job's log")
    before, after = numbers(champion), numbers(challenger)
    checks = [
        _check(
            "gain",
            pair.difference.low > gate.min_gain,
            f"accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f}, difference {_text(pair.difference)} over "
            f"{pair.prompts} prompts",
            f"does not lie above {gate.min_gain:+.3f}",
            f"lies above {gate.min_gain:+.3f}",
        ),
        _check(
            "prompts",
            pair.prompts >= gate.min_prompts,
            f"{pair.prompts} prompts with verdicts on both sides",
            f"are fewer than {gate.min_prompts}",
            f"are at least {gate.min_prompts}",
        ),
        _check(
            "failed",
            max(before["failed"], after["failed"]) <= gate.max_failed,
            f"failed checks: champion {before['failed']:.3f}, challenger {after['failed']:.3f} of the responses",
            f"is more than {gate.max_failed}",
            f"is at most {gate.max_failed}",
        ),
        *_limits(before, after, gate),
    ]
    if gate.max_slice_loss is not None:
        checks.append(_slice_check(pair.slices, gate.max_slice_loss, gate.min_slice_prompts))
    return Decision(all(c.passed for c in checks), tuple(checks), pair.difference, before, after, pair.slices, gate)


def _limits(before: dict[str, float], after: dict[str, float], gate: GateConfig) -> list[GateCheck]:
    """Regressions in what accuracy does not show."""
    limits: list[tuple[str, str, float | None, Callable[[float], bool], str]] = [
        (
            "length",
            "length_mean",
            gate.max_length_growth,
            lambda limit: after["length_mean"] <= limit * before["length_mean"],
            "times the champion's mean response length",
        ),
        (
            "format",
            "format",
            gate.max_format_loss,
            lambda limit: before["format"] - after["format"] <= limit,
            "loss of format score",
        ),
        (
            "truncated",
            "truncated",
            gate.max_truncated_gain,
            lambda limit: after["truncated"] - before["truncated"] <= limit,
            "more truncated responses",
        ),
    ]
    return [
        _check(
            name,
            within(limit),
            f"{metric} {before[metric]:.3f} -> {after[metric]:.3f}",
            f"is beyond the limit: {limit} {of}",
            f"is within the limit: {limit} {of}",
        )
        for name, metric, limit, within, of in limits
        if limit is not None
    ]


def _slice_check(parts: Sequence[PairedSlice], most: float, least_prompts: int) -> GateCheck:
    judged = [p for p in parts if p.prompts >= least_prompts]
    worse = [p for p in judged if p.difference.value < -most and p.difference.high < 0]
    named = "; ".join(f"{p.tag} {_text(p.difference)} ({p.prompts} prompts)" for p in worse)
    if worse:
        return GateCheck("slices", False, f"slices lost more than {most}: {named}")
    return GateCheck("slices", True, f"none of {len(judged)} slices lost more than {most} beyond chance")


def _same_questions(champion: Results, challenger: Results) -> None:
    if champion.keys() != challenger.keys():
        raise DataError(
            f"champion and challenger answered different prompts ({len(champion)} and {len(challenger)}, "
            f"{len(champion.keys() & challenger.keys())} in common); evaluate both on the same data and split"
        )

    def samples(result: PromptResult) -> int:
        return len(result.samples)

    if uneven := [p for p in champion if samples(champion[p]) != samples(challenger[p])]:
        raise DataError(
            f"{uneven[0]} has {samples(champion[uneven[0]])} samples of the champion and "
            f"{samples(challenger[uneven[0]])} of the challenger; evaluate both with the same validation.samples"
        )


def _check(name: str, passed: bool, numbers: str, bad: str, good: str) -> GateCheck:
    return GateCheck(name, passed, f"{numbers}: {good if passed else bad}")


def _text(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _plain(one: PairedSlice) -> dict[str, Any]:
    record: dict[str, Any] = {"tag": one.tag, "prompts": one.prompts, "champion": one.baseline, "challenger": one.ours}
    return record | {"difference": asdict(one.difference)}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
