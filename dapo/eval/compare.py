"""Runs side by side: configuration differences, results at equal cost, and which of them are significant."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dapo.eval.estimate import Interval, accuracy_interval
from dapo.eval.paired import PairedSlice, paired
from dapo.eval.results import Results, accuracies, slices
from dapo.eval.runs import RunRecord, Verdicts

Axis = Literal["step", "responses", "device_hours"]
AXES: dict[Axis, str] = {
    "step": "training steps",
    "responses": "responses generated",
    "device_hours": "device-hours of training",
}
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of what all runs reached: where they are compared."""
AT_EQUAL = (
    "val/accuracy",
    "val/format",
    "val/length_mean",
    "val/truncated",
    "groups/accuracy",
    "reward/mean",
    "train/entropy",
    "engine/gap_mean",
)
"""Metrics compared where all runs ended."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same in all runs."""

    section: str
    """configuration | data | code | packages"""
    key: str
    values: tuple[str, ...]
    """Per run."""


@dataclass(frozen=True, slots=True)
class EqualPoint:
    """Values of a metric in all runs at the same place of an axis."""

    metric: str
    at: float
    values: tuple[float | None, ...]
    """The last one at or before that place; None where there is none."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A run against the first one, over the same prompts; without verdicts in common `difference` is None."""

    run: str
    where: str
    prompts: int
    difference: Interval | None
    slices: tuple[PairedSlice, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run's gain cost: from its first validation to its last."""

    run: str
    first: float | None
    last: float | None
    steps: int
    responses: float | None
    device_hours: float | None

    @property
    def gain(self) -> float | None:
        """Percentage points."""
        return None if self.first is None or self.last is None else 100 * (self.last - self.first)

    def per_point(self, amount: float | None) -> float | None:
        """Of something spent, per percentage point gained; None without a gain."""
        return amount / self.gain if amount is not None and self.gain is not None and self.gain > 0 else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything the page shows, besides the curves."""

    runs: tuple[RunRecord, ...]
    differences: tuple[Difference, ...]
    equal: Mapping[Axis, tuple[EqualPoint, ...]]
    pairs: tuple[Pair, ...]
    """Each run against the first."""
    costs: tuple[Cost, ...]
    slices: Mapping[str, tuple[Interval | None, ...]]
    """Accuracy per slice and run, of each run's first verdicts, else of its last validation's metrics."""


def compare(runs: Sequence[RunRecord]) -> Comparison:
    """Put runs side by side; the first is what the others are measured against."""
    return Comparison(
        runs=tuple(runs),
        differences=tuple(differences(runs)),
        equal={axis: tuple(equal_points(runs, axis)) for axis in AXES},
        pairs=tuple(_pair(runs[0], run) for run in runs[1:]),
        costs=tuple(cost(run) for run in runs),
        slices=_slices(runs),
    )


def differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """Keys of configuration, data, code and packages whose values are not the same everywhere."""
    found = []
    sections: dict[str, list[Mapping[str, str]]] = {
        "configuration": [r.config for r in runs],
        "data": [r.data for r in runs],
        "code": [r.code for r in runs],
        "packages": [r.packages for r in runs],
    }
    for section, columns in sections.items():
        for key in sorted({key for column in columns for key in column}):
            values = tuple(column.get(key, "–") for column in columns)
            if len(set(values)) > 1:
                found.append(Difference(section, key, values))
    return found


def places(run: RunRecord, axis: Axis) -> dict[int, float]:
    """Where on an axis each step ended; step 0 is at 0. Empty where the run has no such numbers."""
    if axis == "step":
        steps = {step for points in run.history.values() for step, _ in points}
        return {step: float(step) for step in sorted(steps | {0})}
    if axis == "responses":
        counted = run.history.get("groups/responses_total", ())
        return {0: 0.0, **dict(counted)} if counted else {}
    spent, total = {0: 0.0}, 0.0
    for step, seconds in run.history.get("time/step", ()):
        total += seconds * run.devices / 3600
        spent[step] = total
    return spent if len(spent) > 1 else {}


def course(run: RunRecord, metric: str, axis: Axis) -> list[tuple[float, float]]:
    """A metric along an axis: (place, value), in order of steps."""
    where = places(run, axis)
    steps = sorted(where)
    points = []
    for step, value in run.history.get(metric, ()):
        before = bisect_right(steps, step)
        if before:
            points.append((where[steps[before - 1]], value))
    return points


def equal_points(runs: Sequence[RunRecord], axis: Axis) -> list[EqualPoint]:
    """Accuracy at quarters of what all runs reached, the other metrics at its end."""
    ends = [max(places(run, axis).values(), default=0.0) for run in runs]
    end = min((e for e in ends if e), default=0.0)
    if not end:
        return []
    asked = [("val/accuracy", end * share) for share in SHARES] + [(metric, end) for metric in AT_EQUAL[1:]]
    found = [EqualPoint(m, at, tuple(_value_at(course(run, m, axis), at) for run in runs)) for m, at in asked]
    return [point for point in found if any(value is not None for value in point.values)]


def cost(run: RunRecord) -> Cost:
    """Totals of a run and what its accuracy was before and after."""
    accuracy = run.history.get("val/accuracy", ())
    totals = {axis: max(places(run, axis).values(), default=0.0) for axis in AXES}
    return Cost(
        run=run.name,
        first=accuracy[0][1] if accuracy else None,
        last=accuracy[-1][1] if accuracy else None,
        steps=int(totals["step"]),
        responses=totals["responses"] or None,
        device_hours=totals["device_hours"] or None,
    )


def _value_at(points: Sequence[tuple[float, float]], at: float) -> float | None:
    # A hair of tolerance: sums of times differ in their last bit.
    before = [value for place, value in points if place <= at * (1 + 1e-9)]
    return before[-1] if before else None


def _pair(baseline: RunRecord, run: RunRecord) -> Pair:
    """The comparison over most answers that both runs gave to the same questions."""
    common = [
        (ours, theirs)
        for ours in run.verdicts
        for theirs in baseline.verdicts
        if ours.asked == theirs.asked and ours.by_prompt.keys() == theirs.by_prompt.keys()
    ]
    if not common:
        return Pair(run.name, _why_no_pair(baseline, run), 0, None, ())
    ours, theirs = max(common, key=lambda pair: _answers(pair[0]))
    found = paired(ours.by_prompt, theirs.by_prompt)
    if found is None:
        return Pair(run.name, "no prompt has a verdict in both runs", 0, None, ())
    return Pair(run.name, f"{ours.where} against {theirs.where}", found.prompts, found.difference, found.slices)


def _why_no_pair(baseline: RunRecord, run: RunRecord) -> str:
    if not run.verdicts or not baseline.verdicts:
        which = " and ".join(r.name for r in (baseline, run) if not r.verdicts)
        return f"no verdicts by prompt of {which}: evaluate both"
    asked = [{prompt for verdicts in r.verdicts for prompt in verdicts.by_prompt} for r in (baseline, run)]
    if asked[0] & asked[1]:
        return "the same prompts, but asked or judged in another way, or by other code: evaluate both again"
    return "no prompts in common: evaluate both with the same data and decoding"


def _answers(verdicts: Verdicts) -> int:
    return sum(len(result.samples) for result in verdicts.by_prompt.values())


def _slices(runs: Sequence[RunRecord]) -> dict[str, tuple[Interval | None, ...]]:
    columns = [_slices_of(run) for run in runs]
    tags = sorted({tag for column in columns for tag in column})
    return {tag: tuple(column.get(tag) for column in columns) for tag in tags}


def _slices_of(run: RunRecord) -> dict[str, Interval]:
    if run.verdicts:
        return {tag: _interval(members) for tag, members in slices(run.verdicts[0].by_prompt).items()}
    found = {}
    for name, value in run.metrics.items():
        if name.startswith("val/slice/") and name.endswith("/accuracy"):
            tag = name.removeprefix("val/slice/").removesuffix("/accuracy")
            found[tag] = Interval(value, float("nan"), float("nan"))
    return found


def _interval(members: Results) -> Interval:
    return accuracy_interval(list(accuracies(members).values()))
