"""Results of prompts made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from dapo.eval.results import PromptResult, Sample


def prompt(
    name: str,
    verdicts: Sequence[bool | None],
    *,
    tags: Sequence[str] = (),
    tokens: int = 100,
    format: float = 1.0,
    truncated: bool = False,
    extracted: Sequence[str] | None = None,
) -> PromptResult:
    samples = tuple(
        Sample(v, None if v is None else format, tokens, truncated, extracted[i] if extracted else str(v))
        for i, v in enumerate(verdicts)
    )
    return PromptResult(name, tuple(tags), samples)


def many(count: int, right: int, **more: object) -> dict[str, PromptResult]:
    """`count` prompts with one sample each, the first `right` of them right; in slices of odd and even number."""
    return {
        f"p{i}": prompt(f"p{i}", [i < right], tags=["half:even" if i % 2 == 0 else "half:odd"], **more)  # type: ignore[arg-type]
        for i in range(count)
    }
