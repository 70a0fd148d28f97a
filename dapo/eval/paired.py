"""Two models over the same prompts: how much more often one is right than the other, in all and in each slice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

from dapo.eval.estimate import Interval, paired_difference
from dapo.eval.results import Results, accuracies, slices


@dataclass(frozen=True, slots=True)
class PairedSlice:
    """One slice: both accuracies, and ours minus the baseline's."""

    tag: str
    prompts: int
    baseline: float
    ours: float
    difference: Interval


@dataclass(frozen=True, slots=True)
class Paired:
    """Accuracy, ours minus the baseline's, over the prompts on which both have a verdict."""

    prompts: int
    difference: Interval
    slices: tuple[PairedSlice, ...]


def paired(ours: Results, baseline: Results) -> Paired | None:
    """The comparison prompt by prompt; None where no prompt has a verdict on both sides."""
    left, right = accuracies(ours), accuracies(baseline)
    common = left.keys() & right.keys()
    if not common:
        return None
    parts = [
        PairedSlice(tag, len(shared), _mean(right, shared), _mean(left, shared), _difference(left, right, shared))
        for tag, members in slices(baseline).items()
        if (shared := members.keys() & common)
    ]
    return Paired(len(common), _difference(left, right, common), tuple(parts))


def _difference(ours: Mapping[str, float], baseline: Mapping[str, float], common: Set[str]) -> Interval:
    return paired_difference({p: ours[p] for p in common}, {p: baseline[p] for p in common})


def _mean(accuracy: Mapping[str, float], prompts: Set[str]) -> float:
    return math.fsum(accuracy[p] for p in prompts) / len(prompts)
