"""Verdicts prompt by prompt: the basis for comparing two models, on any machine, without their answers."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from dapo.errors import DataError
from dapo.eval.estimate import (
    Interval,
    accuracy_interval,
    bootstrap_mean,
    majority,
    over_prompts,
    pass_at_k,
    powers_of_two_to,
)
from dapo.observe.metrics import describe
from dapo.types import RolloutGroup

_MAJORITY_RESAMPLES = 200


@dataclass(frozen=True, slots=True)
class Sample:
    """One judged response. `correct` and `format` are None where the check failed."""

    correct: bool | None
    format: float | None
    tokens: int
    truncated: bool
    extracted: str = ""
    """The answer the grader understood: what majorities are counted by."""


@dataclass(frozen=True, slots=True)
class PromptResult:
    """All samples of one prompt."""

    id: str
    tags: tuple[str, ...]
    samples: tuple[Sample, ...]

    @property
    def accuracy(self) -> float | None:
        """Share of right samples among those with a verdict; None without any."""
        verdicts = [s.correct for s in self.samples if s.correct is not None]
        return sum(verdicts) / len(verdicts) if verdicts else None


Results = Mapping[str, PromptResult]
"""By prompt id."""


def of_groups(groups: Iterable[RolloutGroup]) -> dict[str, PromptResult]:
    """Results of judged groups, one group per prompt."""
    results = {}
    for group in groups:
        samples = []
        for rollout in group.rollouts:
            scored = rollout.scored
            samples.append(
                Sample(
                    correct=scored.accuracy if scored else None,
                    format=scored.format if scored else None,
                    tokens=rollout.length,
                    truncated=rollout.truncated,
                    extracted=scored.extracted if scored else "",
                )
            )
        results[group.prompt.id] = PromptResult(group.prompt.id, group.prompt.tags, tuple(samples))
    return results


def to_lines(results: Results) -> str:
    """JSON lines, one prompt each."""
    return "".join(json.dumps(asdict(result)) + "\n" for result in results.values())


def from_lines(text: str, where: str) -> dict[str, PromptResult]:
    """The inverse of `to_lines`.

    Args:
        where: the file, for the message.

    Raises:
        DataError: a line is not a result.
    """
    results = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            raw = json.loads(line)
            samples = tuple(Sample(**sample) for sample in raw["samples"])
            results[raw["id"]] = PromptResult(raw["id"], tuple(raw["tags"]), samples)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}, line {number} is not a prompt's result: {error}; evaluate again") from None
    return results


def accuracies(results: Results) -> dict[str, float]:
    """Accuracy per prompt; prompts without any verdict are left out."""
    return {prompt: accuracy for prompt, result in results.items() if (accuracy := result.accuracy) is not None}


def numbers(results: Results) -> dict[str, float]:
    """Accuracy (mean over prompts), format, length_mean, length_max (tokens), truncated, failed (shares), counts."""
    samples = [sample for result in results.values() for sample in result.samples]
    lengths = describe([s.tokens for s in samples])
    return {
        "accuracy": describe(list(accuracies(results).values()))["mean"],
        "format": describe([s.format for s in samples if s.format is not None])["mean"],
        "length_mean": lengths["mean"],
        "length_max": lengths["max"],
        "truncated": sum(s.truncated for s in samples) / max(len(samples), 1),
        "failed": sum(s.correct is None for s in samples) / max(len(samples), 1),
        "prompts": len(results),
        "responses": len(samples),
    }


def val_metrics(results: Results) -> dict[str, float]:
    """`val/...` metrics of docs/metrics.md; a failed check is left out of every mean and counted in `val/failed`.

    With n > 1 samples per prompt also `val/mean_at_n`, `val/maj_at_n` and `val/pass_at_k` (k: powers of two, and n).
    """
    accuracy = accuracy_interval(list(accuracies(results).values()))
    several = over_prompts(
        [_of_prompt(result, resampled=False) for result in results.values() if len(result.samples) > 1]
    )
    metrics = {f"val/{name}": value for name, value in numbers(results).items()}
    metrics |= {"val/accuracy_low": accuracy.low, "val/accuracy_high": accuracy.high}
    metrics |= {f"val/{name.replace('@', '_at_')}": value for name, value in several.items()}
    for tag, members in slices(results, _metric_name).items():
        metrics[f"val/slice/{tag}/accuracy"] = describe(list(accuracies(members).values()))["mean"]
        metrics[f"val/slice/{tag}/prompts"] = len(members)
    return metrics


def _metric_name(tag: str) -> str:
    return re.sub(r"[^\w.\- :]", "_", tag)  # MLflow allows nothing else in a name


def slices(results: Results, named: Callable[[str], str] = str) -> dict[str, dict[str, PromptResult]]:
    """Results by tag, as `named` writes it; a prompt is in each of its tags."""
    found: dict[str, dict[str, PromptResult]] = defaultdict(dict)
    for prompt, result in results.items():
        for tag in result.tags:
            found[named(tag)][prompt] = result
    return dict(sorted(found.items()))


def estimates(results: Results) -> dict[str, Interval]:
    """`mean@n`, `pass@k` (unbiased) and `maj@k`, k over powers of two below n and n, with 95 % intervals over prompts.

    `maj@n` is the verdict on the answer most samples agree on; `maj@k` below n its mean over resamples of k.
    """
    per_prompt: dict[str, list[float]] = defaultdict(list)
    for result in results.values():
        for name, value in _of_prompt(result, resampled=True).items():
            per_prompt[name].append(value)
    return {name: accuracy_interval(values) for name, values in per_prompt.items()}


def _of_prompt(result: PromptResult, *, resampled: bool) -> dict[str, float]:
    """`mean@n`, and of several samples `pass@k` and `maj@n`; with `resampled` also `maj@k` below n."""
    judged = [s for s in result.samples if s.correct is not None]
    n = len(judged)
    if not n:
        return {}
    verdicts = [bool(s.correct) for s in judged]
    found = {f"mean@{len(result.samples)}": sum(verdicts) / n}
    if len(result.samples) == 1:
        return found
    votes = [s.extracted for s in judged]
    # A failed check leaves fewer samples; a k above their number says nothing about this prompt.
    for k in powers_of_two_to(len(result.samples)):
        if k <= n:
            found[f"pass@{k}"] = pass_at_k(n, sum(verdicts), k)
    for k in powers_of_two_to(len(result.samples)):
        if k == len(result.samples):
            found[f"maj@{k}"] = float(verdicts[majority(votes, range(n))])
        elif resampled and k <= n:
            found[f"maj@{k}"] = bootstrap_mean(
                n, k, lambda row: float(verdicts[majority(votes, row)]), resamples=_MAJORITY_RESAMPLES
            )
    return found
