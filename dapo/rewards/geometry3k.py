"""The reward of the recipe on Geometry3K: the last box is right, and the response has the asked form."""

from __future__ import annotations

import re

from dapo.rewards.equal import equivalent
from dapo.types import Scored

BOX = "\\boxed{"
_BRACES = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)
SHOWN_CHARS = 200
"""Of an extracted answer, kept for people."""


def grade(response: str, answer: str) -> Scored:
    """Judge a response: `accuracy` by its last complete box, `format` by its form.

    Takes any two strings; never raises; time is linear in the response, and bounded for the answer in the box.
    """
    boxed = last_boxed(response)
    return Scored(
        accuracy=boxed is not None and equivalent(boxed, answer),
        format=1.0 if has_format(response) else 0.0,
        extracted="" if boxed is None else boxed.strip()[:SHOWN_CHARS],
    )


def has_format(response: str) -> bool:
    """Whether the response is ``<think>...</think>...\\boxed{...}...``: begins with the tag, the rest in this order."""
    if not response.startswith("<think>"):
        return False
    close = response.find("</think>", len("<think>"))
    box = response.find(BOX, close) if close >= 0 else -1
    return box >= 0 and response.find("}", box) >= 0


def last_boxed(response: str) -> str | None:
    """What is in the last ``\\boxed{...}`` that is closed; of nested ones, the innermost. Linear time."""
    start = response.rfind(BOX)
    if start < 0:
        return None
    depth = 0
    for brace in _BRACES.finditer(response, start):
        token = brace[0]
        if token == "}":
            depth -= 1
            if depth == 0:
                return response[start + len(BOX) : brace.start()]
        elif token[-1] == "{" and len(token) != 2:
            depth += 1
    return _last_closed(response)


def _last_closed(response: str) -> str | None:
    """For a response whose last box is open: one pass over all braces."""
    opened: list[int | None] = []
    best, end = -1, -1
    for brace in _BRACES.finditer(response):
        token = brace[0]
        if token == "}":
            start = opened.pop() if opened else None
            if start is not None and start > best:
                best, end = start, brace.start()
        elif token == "{":
            opened.append(None)
        elif token == BOX:
            opened.append(brace.end())
    return response[best:end] if best >= 0 else None
