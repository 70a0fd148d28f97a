"""Estimates from samples: pass@k, majority of k, resampling, intervals, paired differences."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Reducer = Callable[[list[int]], float]
"""From the indices of a resample to a number."""

# Two-sided 95 % of the normal distribution.
_Z95 = 1.959963984540054
_SEED = 42


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with its 95 % confidence bounds."""

    value: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k samples is right: unbiased, from `correct` right of `samples` (>= k) drawn.

    1 - C(samples - correct, k) / C(samples, k). Source: arXiv 2107.03374, equation 1.
    """
    if not 0 < k <= samples:
        raise ValueError(f"k={k} must lie between 1 and the {samples} samples drawn")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def bootstrap_mean(size: int, subset: int, reduce: Reducer, *, resamples: int) -> float:
    """Mean of `reduce` over resamples of `subset` of `size` items, with replacement.

    The same indices at every call, so that prompts and runs are comparable.
    """
    return math.fsum(map(reduce, resample_rows(size, subset, resamples, _SEED))) / resamples


def resample_rows(size: int, subset: int, resamples: int, seed: int) -> list[list[int]]:
    """[resamples][subset] indices below `size`, by NumPy's MT19937 as the reference draws them."""
    rows: list[list[int]] = np.random.RandomState(seed).randint(0, size, (resamples, subset)).tolist()
    return rows


def majority(votes: Sequence[Hashable], row: Sequence[int]) -> int:
    """Index of the first item whose vote is the most frequent of a row; of equal votes the one seen first."""
    winner = Counter(votes[i] for i in row).most_common(1)[0][0]
    return next(i for i in row if votes[i] == winner)


def powers_of_two_to(n: int) -> list[int]:
    """2, 4, 8, ... below n, and n."""
    return [*(2**e for e in range(1, n.bit_length()) if 2**e < n), n]


def over_prompts(estimates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over prompts; a name that only some prompts have is averaged over these."""
    values = defaultdict(list)
    for one in estimates:
        for name, value in one.items():
            values[name].append(value)
    return {name: math.fsum(having) / len(having) for name, having in values.items()}


def accuracy_interval(per_prompt: Sequence[float]) -> Interval:
    """Mean accuracy with the Wilson score interval; prompts, not samples, are what varies independently.

    With several samples per prompt the effective number of trials is p (1 - p) over the squared standard error of the
    prompts' means; with one it is the number of prompts, and this is the textbook interval.
    """
    prompts = len(per_prompt)
    if not prompts:
        return Interval(math.nan, math.nan, math.nan)
    p = math.fsum(per_prompt) / prompts
    variance = math.fsum((x - p) ** 2 for x in per_prompt) / prompts
    trials = max(prompts * p * (1 - p) / variance if variance > 1e-12 else 0.0, float(prompts))
    centre = (p + _Z95**2 / (2 * trials)) / (1 + _Z95**2 / trials)
    half = _Z95 / (1 + _Z95**2 / trials) * math.sqrt(p * (1 - p) / trials + _Z95**2 / (4 * trials**2))
    return Interval(p, max(centre - half, 0.0), min(centre + half, 1.0))


def paired_difference(
    ours: Mapping[str, float], theirs: Mapping[str, float], *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of ours minus theirs over the same prompts, with the 95 % percentile interval of resampled prompts.

    Args:
        ours, theirs: a value per prompt id, measured with the same decoding.

    Raises:
        ValueError: not the same prompts, or none.
    """
    if not ours or ours.keys() != theirs.keys():
        raise ValueError(
            f"a paired difference needs the same prompts on both sides: {len(ours)} and {len(theirs)} given, "
            f"{len(ours.keys() & theirs.keys())} in common; evaluate both on one data set"
        )
    differences = np.array([ours[prompt] - theirs[prompt] for prompt in sorted(ours)])
    generator = np.random.default_rng(seed)
    count = len(differences)
    rows = max(1, 2_000_000 // count)  # indices held at a time: 16 MB
    means = np.concatenate(
        [
            differences[generator.integers(0, count, (min(rows, resamples - done), count))].mean(axis=1)
            for done in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))
