"""What may stand beside the value in an equation: a name, or a quantity made of names."""

from __future__ import annotations

from collections.abc import Sequence

from dapo.rewards.expression import FUNCTIONS, VARIABLES
from dapo.rewards.latex import MULTIPLIERS, TEXT, closing
from dapo.rewards.units import only_names, read_unit

MAX_TOKENS = 12
"""Longer names are not read."""

_PREFIXES = {
    "\\angle", "\\measuredangle", "\\triangle", "\\overline", "\\overarc", "\\widehat", "\\hat", "\\bar", "\\vec",
    "\\overrightarrow", "\\overleftrightarrow", "\\overset", "\\stackrel", "\\frown", "\\odot",
}  # fmt: skip
_CALLED = {f"\\{function}" for function in FUNCTIONS} | {"\\arcsin", "\\arccos", "\\arctan", "\\log", "\\ln"}
_FUNCTION_NAMES = set("fghFGHP")
_AROUND = {"{", "}", "(", ")", "_", "'", "|", "\\deg"}
_OPERATORS = {"+", "-", "*", "/", "^", ":", "[", "]", "%", ".", "\\frac", "\\sqrt", "\\pi", "sqrt", "cbrt"}
_NO_NAMES = {"sqrt", "cbrt", *FUNCTIONS, *MULTIPLIERS}


def is_name(tokens: Sequence[str]) -> bool:
    """``x``, ``AB``, ``x_1``, ``\\angle 1``, ``|AB|``, ``f(2)``, ``\\sin A``, ``\\text{Area}``.

    Not ``|x|``: a length has one value, the absolute value of a variable leaves two.
    """
    if len(tokens) == 3 and tokens[0] == tokens[2] == "|" and len(tokens[1]) == 1 and tokens[1].islower():
        return False
    if tokens[0] in _FUNCTION_NAMES and tokens[1:2] == ["("] and closing(tokens[1:]) == len(tokens) - 2:
        return is_quantity(tokens)
    known = _PREFIXES | _CALLED | _AROUND
    return (
        len(tokens) <= MAX_TOKENS
        and bool(unknowns(tokens))
        and all(
            token in known or token in FUNCTIONS or _is_word(token) or _is_index(tokens, i)
            for i, token in enumerate(tokens)
        )
        and is_quantity(tokens)
    )


def is_quantity(tokens: Sequence[str]) -> bool:
    """Names, numbers and the signs of a formula; nothing that denies what is said, or that we do not know."""
    if not any(token[0].isdigit() or _is_word(token) or token == "\\pi" for token in tokens):
        return False
    known = _PREFIXES | _CALLED | _AROUND | _OPERATORS
    return all(token in known or token[0].isdigit() or _is_word(token) for token in tokens) and only_names(
        word for token in tokens for word in token.strip(TEXT).split()
    )


def unknowns(tokens: Sequence[str]) -> set[str]:
    """The names in a formula, each with its index; ``AB`` is one and ``bh`` are two, units are none."""
    found = set()
    for position, token in enumerate(tokens):
        following = tokens[position + 1 : position + 4]
        if tokens[position - 1 : position] == ["_"] or tokens[position - 2 : position] == ["_", "{"]:
            continue
        if token == "m" and following[:1] and following[0] in _PREFIXES:
            continue
        if len(token) == 2 and token.isalpha() and token.islower() and not _is_unit(token):
            found |= set(token)
        elif (_is_word(token) and not _is_unit(token)) or _is_index(tokens, position):
            found.add(token + "".join(following) if following[:1] == ["_"] else token)
    return found


def _is_word(token: str) -> bool:
    return (token[0].isalpha() or token[0] == TEXT or token in VARIABLES) and token not in _NO_NAMES


def _is_unit(token: str) -> bool:
    return len(token) > 1 and read_unit([token]) is not None


def _is_index(tokens: Sequence[str], position: int) -> bool:
    """A number that belongs to a name: ``x_1``, ``\\angle 1``."""
    group = position > 1 and tokens[position - 1] == "{"
    before = tokens[position - 1 - group] if position > group else ""
    return tokens[position].isdigit() and (before == "_" or before in _PREFIXES)
