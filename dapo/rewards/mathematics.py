"""Rewards for text-only mathematics: an "Answer:" line, a box alone, or a line after ####. Same equality, other places.

Take any two strings and never raise, in time linear in the response, like `dapo.rewards.geometry3k.grade`.
"""

from __future__ import annotations

import re

from dapo.rewards.equal import equivalent
from dapo.rewards.geometry3k import SHOWN_CHARS, last_boxed
from dapo.types import Scored

_ANSWER_LINE = re.compile(r"answer\s*:\s*(\S[^\n]*)", re.IGNORECASE)
_HASHES_LINE = re.compile(r"####[ \t]*(\S[^\n]*)")
_BARE_BOX = re.compile(r"\\boxed[ \t]+([^\s{$][^\n$]*)")
_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


def answer_line(response: str, answer: str) -> Scored:
    """DAPO's own task (DAPO-Math-17k, AIME): the last line "Answer: ...", or the last box where no line begins so."""
    line = _last(_ANSWER_LINE, response)
    return _scored(last_boxed(response) if line is None else line, answer, has_form=line is not None)


def boxed(response: str, answer: str) -> Scored:
    """MATH: the last complete box, whatever stands around it; ``\\boxed 48`` counts to the end of its line."""
    box = last_boxed(response)
    if box is None:
        box = _last(_BARE_BOX, response)
    return _scored(box, answer, has_form=box is not None)


def hashes(response: str, answer: str) -> Scored:
    """GSM8K: what follows the last ####, in the response and in the ground truth (which may be the answer alone)."""
    line, truth = _last(_HASHES_LINE, response), _last(_HASHES_LINE, answer)
    return _scored(line, answer if truth is None else truth, has_form=line is not None)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    line = None
    for match in pattern.finditer(text):
        line = match[1]
    return line


def _scored(given: str | None, answer: str, *, has_form: bool) -> Scored:
    if given is None:
        return Scored(accuracy=False)
    inner = last_boxed(given[:SHOWN_CHARS])
    plain = inner if inner is not None else _ARTICLE.sub("", given.lstrip("*_ \t").rstrip("*_. \t"))
    return Scored(equivalent(plain, answer), format=float(has_form), extracted=plain[:SHOWN_CHARS])
