"""Checks of an engine's responses, and the proof that it holds the trainer's weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dapo.errors import EngineError, ProofError
from dapo.types import Completion

_SAME = 1e-6
"""Relative difference of two sums over equal values that were added in another order."""


def check_completion(completion: Completion, vocab_size: int, banned: Collection[int] = ()) -> None:
    """Refuse a response that a correct engine cannot have sampled.

    Raises:
        EngineError: it is empty, holds an id outside the vocabulary or a banned one, or a log-probability is not
            finite or above zero.
    """
    if not completion.token_ids or len(completion.token_ids) != len(completion.logprobs):
        raise EngineError(
            f"the engine returned {len(completion.token_ids)} tokens with {len(completion.logprobs)} log-probabilities "
            "for one request; a response has at least one token and as many log-probabilities"
        )
    low, high = min(completion.token_ids), max(completion.token_ids)
    if low < 0 or high >= vocab_size:
        raise EngineError(f"the engine returned token {low if low < 0 else high}; the vocabulary has {vocab_size} ids")
    # NaN fails both comparisons. An engine may round a certain token's log-probability to just above zero.
    if not all(-math.inf < value <= 1e-3 for value in completion.logprobs):
        wrong = next(v for v in completion.logprobs if not -math.inf < v <= 1e-3)
        raise EngineError(
            f"the engine returned log-probability {wrong} for a token it sampled: its weights or its cache are damaged "
            "(NaN), or its sampler is broken"
        )
    if banned and not set(banned).isdisjoint(completion.token_ids):
        raise EngineError(f"the engine sampled {set(banned).intersection(completion.token_ids)}, which is banned")


def kept_sums(given: Mapping[str, float], unchanged: Collection[str]) -> dict[str, float]:
    """Of what an engine was given so far, the sums of the tensors that it keeps in this sync.

    Raises:
        EngineError: one of them was never given to it.
    """
    if never := [name for name in unchanged if name not in given]:
        raise EngineError(f"weight sync: {never[0]} was not sent, and this engine has never been given it")
    return {name: given[name] for name in unchanged}


def agreed_sums(of_workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sums that all workers of one engine report.

    Raises:
        EngineError: one of them was given something else than the first.
    """
    first, *others = of_workers
    for number, sums in enumerate(others, 1):
        for name in sorted(first.keys() | sums.keys()):
            one, other = first.get(name), sums.get(name)
            if one is None or other is None or not math.isclose(one, other, rel_tol=_SAME):
                raise EngineError(
                    f"weight sync: the engine's workers were given different weights: the sum of |values| of {name} is "
                    f"{one} in worker 0 and {other} in worker {number}"
                )
    return dict(first)


def compare_fingerprints(trainer: Mapping[str, float], engine: Mapping[str, float]) -> None:
    """Every tensor of the trainer must have arrived: sums of absolute values agree.

    Args:
        trainer: per tensor, in the trainer's order; the first wrong one is named.
        engine: of what it was given, before it rounds or packs it.

    Raises:
        ProofError: names the first tensor that is missing or differs.
    """
    if not trainer or not engine:
        raise ProofError("weight sync: a fingerprint is empty, so nothing can be compared")
    for name, want in trainer.items():
        have = engine.get(name)
        if have is None:
            raise ProofError(f"weight sync: the engine has no tensor {name}")
        if not abs(have - want) <= _SAME * max(abs(want), 1e-12):
            raise ProofError(
                f"weight sync: {name} did not arrive: sum of |values| is {have!r} in the engine and {want!r} in the "
                "trainer; it is the first wrong tensor"
            )


@dataclass(frozen=True, slots=True)
class ProbeGap:
    """Engine against trainer log-probabilities of the same sampled tokens, nats."""

    mean: float
    largest: float
    tokens: int


def probe_gap(engine: Sequence[Sequence[float]], trainer: Sequence[Sequence[float]]) -> ProbeGap:
    """Absolute differences over all tokens of all probe responses; NaN counts as infinite."""
    gaps = [
        math.inf if math.isnan(a) or math.isnan(b) else abs(a - b)
        for ours, theirs in zip(engine, trainer, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    if not gaps:
        raise EngineError("the log-prob probe has no tokens: give it prompts and at least one sample")
    return ProbeGap(sum(gaps) / len(gaps), max(gaps), len(gaps))


def check_probe(gap: ProbeGap, tolerance: float, *, after: str) -> None:
    """Stop where the engine computes something else than the trainer.

    Args:
        tolerance: largest mean difference, nats.
        after: what happened last, for the message ("weight sync to version 3", "wake-up").

    Raises:
        ProofError: says which causes the size of the gap points at.
    """
    if gap.mean <= tolerance:
        return
    if math.isinf(gap.mean):
        cause = "NaN: damaged weights, or an attention cache that kept NaN of earlier weights"
    elif gap.mean > 0.5:
        cause = "that large a gap is other weights: stale or transposed tensors, skipped repacking, a partial sync"
    else:
        cause = "a small gap is another distribution: stale image features, temperature, banned ids, or precision"
    raise ProofError(
        f"log-prob probe after {after}: engine and trainer differ by {gap.mean:.3g} nats on average over {gap.tokens} "
        f"tokens (largest {gap.largest:.3g}, allowed {tolerance:.3g}); {cause}"
    )


def default_tolerance(trainer: str, engine: str) -> float:
    """Mean |difference| in nats that stops a run, by the coarser of two dtypes: bfloat16 carries 8 bits (measured 0.013
    to 0.02), float32 24."""
    return 1e-3 if trainer == engine == "float32" else 0.05
