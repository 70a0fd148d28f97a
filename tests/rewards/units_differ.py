"""A second opinion on units for the parity tests, independent of the grader's tables."""

from __future__ import annotations

import re

MAX_CHARS = 40

_NUMBER_AND_WORD = re.compile(
    r"[^A-Za-z]*[0-9.]+[^A-Za-z]*?(?:\\(?:text|mathrm)\s*\{)?\s*([A-Za-z]+)[}\s]*(\^\{?[23]\}?)?\s*"
)
_SAME = {"centimeters": "cm", "centimeter": "cm", "cms": "cm", "meters": "m", "meter": "m", "feet": "ft", "foot": "ft"}


def units_differ(one: str, two: str) -> bool:
    """Both are a number and one word, and the words (or their powers) are not the same unit."""
    if max(len(one), len(two)) > MAX_CHARS:
        return False
    a, b = _NUMBER_AND_WORD.fullmatch(one), _NUMBER_AND_WORD.fullmatch(two)
    return a is not None and b is not None and _unit(a) != _unit(b)


def _unit(match: re.Match[str]) -> tuple[str, str]:
    word = match[1].lower()
    return _SAME.get(word, word.removesuffix("s")), (match[2] or "").strip("^{}")
