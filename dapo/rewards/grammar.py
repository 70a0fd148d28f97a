"""The grammar of an answer: one value with its unit and name, or a list, tuple, set or interval of them.

answer    = item { "," item } | "(" item "," ... ")" | "{" item ... "}"        (also "or", "and", ";")
item      = [ name "=" ] expression [ unit ]  |  expression "=" expression
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dapo.rewards.expression import VARIABLES, Expr, Product, Sum, Unreadable, negated, parse_expression
from dapo.rewards.latex import OPENING, TEXT, closing
from dapo.rewards.units import Unit, label, read_unit

MAX_ITEMS = 20
"""Elements of a list, tuple or set."""


class Reading(NamedTuple):
    """One way to read an item: a value and its unit."""

    value: Expr
    unit: Unit | None


class Item(NamedTuple):
    readings: tuple[Reading, ...]
    """More than one where a last letter may be a unit or a variable (``12 m``)."""
    name: tuple[str, ...] = ()
    equation: bool = False
    """The value is the difference of the two sides."""


class Many(NamedTuple):
    opening: str
    """``(`` or ``[`` for ordered coordinates and intervals, empty for lists and sets."""
    closing: str
    elements: tuple[Value, ...]


Value = Item | Many

_NAMING = VARIABLES | {"\\angle", "\\triangle", "\\overline", "\\measuredangle", "\\widehat", "\\deg", "\\odot", "\\pi"}
_DECORATION = {"{", "}", "_", "(", ")", "'", "\\{", "\\}"}


def parse(tokens: Sequence[str]) -> Value:
    """Read an answer.

    Raises:
        Unreadable: it is outside the grammar.
    """
    if "\\pm" in tokens:
        both = [[sign if token == "\\pm" else token for token in tokens] for sign in ("+", "-")]
        return Many("", "", tuple(parse(one) for one in both))
    parts = _split(tokens, ",")
    if len(parts) > 1:
        return Many("", "", tuple(parse(part) for part in parts))
    if tokens and tokens[0] in ("(", "[", "\\{") and closing(tokens) == len(tokens) - 1:
        inner = tokens[1:-1]
        if len(elements := _split(inner, ",")) > 1:
            ends = ("", "") if tokens[0] == "\\{" else (tokens[0], tokens[-1])
            return Many(*ends, tuple(parse(element) for element in elements))
        if tokens[0] == "\\{":
            return parse(inner)
    ratio = _split(tokens, ":")
    if len(ratio) > 2:
        return Many(":", ":", tuple(parse(part) for part in ratio))
    return _item(tokens)


def _split(tokens: Sequence[str], separator: str) -> list[Sequence[str]]:
    """Parts between separators outside all brackets; an empty last part (", and") joins its neighbour."""
    if separator not in tokens:
        return [tokens]
    parts, depth, start = [], 0, 0
    for position, token in enumerate(tokens):
        if token in OPENING:
            depth += 1
        elif token in OPENING.values():
            depth -= 1
        elif token == separator and depth == 0:
            parts.append(tokens[start:position])
            start = position + 1
    parts = [part for part in [*parts, tokens[start:]] if part]
    if len(parts) > MAX_ITEMS:
        raise Unreadable(f"more than {MAX_ITEMS} elements")
    return parts


def _item(tokens: Sequence[str]) -> Item:
    if len(tokens) == 1 and tokens[0].isalpha() and len(tokens[0]) > 1:
        raise Unreadable("a word is compared as a word")
    if "=" not in tokens:
        return Item(_readings(tokens))
    sides = [side for side in _split(tokens, "=") if side]
    if not sides:
        raise Unreadable("an equation of nothing")
    if len(sides) == 1:
        return Item(_readings(sides[0]))
    first, last = sides[0], sides[-1]
    if _is_name(first):
        return Item(_readings(last), tuple(first))
    if len(sides) == 2 and _is_name(last):
        return Item(_readings(first), tuple(last))
    if len(sides) == 2:
        difference = Sum((_expression(first), negated(_expression(last))))
        return Item((Reading(difference, None),), equation=True)
    return Item(_readings(last))


def _is_name(tokens: Sequence[str]) -> bool:
    """``x``, ``AB``, ``x_1``, ``\\angle ABC``, ``f(x)``, ``\\text{Area}``: what an equation calls its value."""
    if len(tokens) > 10:
        return False
    for position, token in enumerate(tokens):
        indexed = position and (tokens[position - 1] == "_" or tokens[position - 2 : position] == ["_", "{"])
        if not (token[0].isalpha() or token[0] == TEXT or token in _NAMING or token in _DECORATION or indexed):
            return False
    return True


def _readings(tokens: Sequence[str]) -> tuple[Reading, ...]:
    """The whole as an expression, or an expression and the unit behind it."""
    for start in range(1, len(tokens)):
        token = tokens[start]
        if not (token[0].isalpha() or token[0] == TEXT) or tokens[start - 1] in ("^", "_", "+", "-", "*", "/"):
            continue
        unit = read_unit(tokens[start:])
        if unit is None and token[0] == TEXT and start == len(tokens) - 1:
            unit = label(token.strip(TEXT))
        if unit is None:
            continue
        value = _expression(tokens[:start])
        if len(token) > 1:
            return (Reading(value, unit),)
        whole = Reading(_expression(tokens), None)
        return (whole,) if isinstance(value, Sum) else (Reading(value, unit), whole)
    return (Reading(_expression(tokens), None),)


def _expression(tokens: Sequence[str]) -> Expr:
    ratio = _split(tokens, ":")
    if len(ratio) == 2:
        return Product((_expression(ratio[0]),), (_expression(ratio[1]),))
    return parse_expression(tokens)
