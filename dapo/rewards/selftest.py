"""`dapo reward test`: what a reward must do before a run trusts it. Runs in worker processes, like in training."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo.config.data import RewardConfig
from dapo.errors import ConfigError, RewardError
from dapo.rewards.pool import Judged, RewardPool
from dapo.types import Scored

HUGE_CHARS = 1 << 18


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Golden:
    """A response whose verdict is known."""

    response: str
    answer: str
    accuracy: bool


def _solution(value: str) -> str:
    return f"<think>We add 24 and 24.</think>\n#### {value}\nAnswer: $\\boxed{{{value}}}$"


GOLDEN = (
    Golden(_solution("48"), "48", True),
    Golden(_solution("47"), "48", False),
    Golden(_solution("-48"), "48", False),
    Golden(_solution("48"), "-48", False),
    Golden("I do not know.", "48", False),
)
"""For any reward that reads numbers from a box, an "Answer:" line or behind ####."""

EMPTY = (("", "48"), (" \n", "48"), (_solution("48"), ""), ("", ""), (_solution(""), "48"), ("\\boxed{", "48"))
HUGE = tuple(
    (text, "48")
    for text in (
        "a" * HUGE_CHARS,
        "\\boxed{" * (HUGE_CHARS // 7),
        "{" * HUGE_CHARS,
        f"\\boxed{{{'9' * HUGE_CHARS}}}",
        f"\\boxed{{1{' ' * HUGE_CHARS}2}}",
        f"\\boxed{{{'1+' * (HUGE_CHARS // 2)}1}}",
        "</think>" * (HUGE_CHARS // 8),
        "Answer: 1\n" * (HUGE_CHARS // 10),
    )
)
UNICODE = tuple(
    (_solution(text), "48")
    for text in (
        "四十八",
        "٤٨",
        "\u202e84",
        "48\ufffd",
        "4\u03018",
        "\U0001f4d0",
        "\ud800",
        "\x00",
        "４８",
        "⅘⁸",
        "∑√π",
    )
)


def run(function: str, *, deadline_s: float = 5.0, golden: Sequence[Golden] = GOLDEN) -> list[Finding]:
    """Check a reward; one finding per check, in a fixed order.

    Args:
        function: `module:name`.
        deadline_s: as in the configuration of the run.
        golden: known verdicts; the default fits rewards that read a number from a box.
    """
    try:
        with RewardPool(function, workers=1, deadline_s=deadline_s) as pool:
            return [Finding("loads", True, f"{function} can be imported and called"), *_checks(pool, golden)]
    except (ConfigError, RewardError) as error:
        return [Finding("loads", False, str(error))]


def _checks(pool: RewardPool, golden: Sequence[Golden]) -> list[Finding]:
    known = [(g.response, g.answer) for g in golden]
    items = [*known, *EMPTY, *HUGE, *UNICODE]
    first, slowest, where = _one_by_one(pool, items)
    with RewardPool(pool.function, workers=1, deadline_s=pool.deadline_s) as fresh:
        backwards = fresh.score(items[::-1])[::-1]
    wrong = [
        f"{_short(g.response)} for {g.answer!r} is {'right' if g.accuracy else 'wrong'}, the reward says {outcome}"
        for g, outcome in zip(golden, first, strict=False)
        if not (isinstance(outcome, Scored) and outcome.accuracy is g.accuracy)
    ]
    parts = {"empty": EMPTY, "huge": HUGE, "unicode": UNICODE}
    findings = [_finding("golden answers", wrong, f"{len(golden)} known verdicts agree")]
    start = len(known)
    for name, part in parts.items():
        outcomes = first[start : start + len(part)]
        start += len(part)
        bad = [
            f"{_short(response)} for {answer!r}: {outcome}"
            for (response, answer), outcome in zip(part, outcomes, strict=True)
            if not isinstance(outcome, Scored) or (name == "empty" and outcome.accuracy)
        ]
        findings.append(_finding(name, bad, f"{len(part)} inputs judged" + ", none right" * (name == "empty")))
    twice = pool.score([item for item in items for _ in range(2)])
    findings.append(_law("repetition", items, twice[::2], twice[1::2], "the same input twice gives the same outcome"))
    findings.append(_law("order", items, first, backwards, "backwards in a fresh process gives the same outcomes"))
    limit = pool.deadline_s / 2
    bad = (
        []
        if slowest < limit
        else [f"{slowest:.2f} s for {_short(where)}; more than half of the {limit * 2:g} s allowed"]
    )
    findings.append(_finding("time", bad, f"slowest check {slowest * 1e3:.1f} ms of {pool.deadline_s:g} s allowed"))
    return findings


def _finding(check: str, problems: Sequence[str], success: str) -> Finding:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Finding(check, not problems, problems[0] + more if problems else success)


def _law(
    check: str, items: Sequence[tuple[str, str]], one: Sequence[Judged], two: Sequence[Judged], law: str
) -> Finding:
    # Times vary: a check that timed out in one pass only is the affair of the other checks.
    different = [
        f"{_short(response)} for {answer!r}: first {a}, then {b}"
        for (response, answer), a, b in zip(items, one, two, strict=True)
        if a != b
    ]
    return _finding(check, different, law)


def _one_by_one(pool: RewardPool, items: Sequence[tuple[str, str]]) -> tuple[list[Judged], float, str]:
    """Outcomes, and the seconds (transport included) and the response of the slowest.

    For a worker that has judged nothing yet: what a reward remembers would be fast.
    """
    outcomes: list[Judged] = []
    slowest, where = 0.0, ""
    for item in items:
        started = time.perf_counter()
        outcomes += pool.score([item])
        seconds = time.perf_counter() - started
        if seconds > slowest:
            slowest, where = seconds, item[0]
    return outcomes, slowest, where


def _short(text: str) -> str:
    return ascii(text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)")


def read_golden(path: Path) -> list[Golden]:
    """Known verdicts from a JSON file: a list of ``{"response": ..., "answer": ..., "accuracy": true}``.

    Raises:
        ConfigError: the file is missing or not of this form.
    """
    try:
        return [Golden(str(e["response"]), str(e["answer"]), bool(e["accuracy"])) for e in json.loads(path.read_text())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'golden file {path}: {type(error).__name__}: {error}; needed is a list of {{"response", "answer", '
            f'"accuracy"}}'
        ) from error


def report(function: str | None = None, *, golden: Path | None = None, deadline_s: float | None = None) -> bool:
    """Run the checks and write one line for each on standard output; True where all passed.

    Args:
        function: `module:name`; None, like the other two: as in a configuration that says nothing.
        golden: JSON file of known verdicts (`read_golden`).
        deadline_s: seconds allowed per check.

    Raises:
        ConfigError: the golden file cannot be read.
    """
    default = RewardConfig()
    findings = run(
        function or default.function,
        deadline_s=default.deadline_s if deadline_s is None else deadline_s,
        golden=GOLDEN if golden is None else read_golden(golden),
    )
    for finding in findings:
        sys.stdout.write(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.check}: {finding.detail}\n")
    return all(finding.ok for finding in findings)
