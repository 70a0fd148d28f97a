"""The grammar of an answer: one value with its unit and name, or a list, tuple, set or interval of them.

answer    = equation { "," equation }                                           (also "or", "and", ";")
equation  = value  |  name "=" value  |  side { "=" side } [ "\\approx" number ]
value     = "(" answer "," ... ")"  |  "{" answer ... "}"  |  expression [ unit ]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from dapo.rewards.expression import Unreadable, parse_expression
from dapo.rewards.latex import OPENING, TEXT, closing
from dapo.rewards.names import is_name, is_quantity, unknowns
from dapo.rewards.tree import Expr, Num, Product, Sum, Sym, negated
from dapo.rewards.units import Unit, label, read_unit

MAX_ITEMS = 20
"""Elements of a list, tuple or set."""

_DECIMAL = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")


class Reading(NamedTuple):
    """One way to read an item: a value and its unit."""

    value: Expr
    unit: Unit | None


class Rounded(NamedTuple):
    """What stands behind ``\\approx``; it counts if it is the value, rounded."""

    reading: Reading
    half_step: Fraction
    """Half a unit of its last digit."""


class Item(NamedTuple):
    readings: tuple[Reading, ...]
    """More than one where a last letter may be a unit or a variable (``12 m``); none in an unsolved equation."""
    name: tuple[str, ...] = ()
    equation: Expr | None = None
    """The difference of the two sides, if names are left in them (``2x + 3y = 7``)."""
    rounded: Rounded | None = None


class Many(NamedTuple):
    opening: str
    """``(`` or ``[`` for ordered coordinates and intervals, ``:`` for ratios, empty for lists and sets."""
    closing: str
    elements: tuple[Value, ...]
    name: tuple[str, ...] = ()


Value = Item | Many


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
    if "=" in tokens or "\\approx" in tokens:
        return _equation([_split(part, "=") for part in _split(tokens, "\\approx")])
    return _value(tokens)


def _equation(parts: Sequence[Sequence[Sequence[str]]]) -> Value:
    """Sides joined by equals signs, in parts joined by approximate ones.

    The last side counts, so that nobody can claim two values. An equation in one unknown that is not by itself on its
    side (``2x = 48``) claims none: its solution is another number.
    """
    sides = [side for part in parts for side in part if side]
    if len(sides) < 2:
        return _value(sides[0] if sides else ())
    names = [side for side in sides if _is_name(side)]
    formulas = [side for side in sides if side not in names] or sides[-1:]
    if not all(map(is_quantity, formulas[:-1])):
        raise Unreadable("a side that is no formula")
    counts = [len(unknowns(side)) for side in formulas]
    solved = bool(names) or all(counts) or (counts[-1] == 0 and 1 not in counts)
    exact = [side for side in parts[0] if side in formulas] if len(parts) > 1 else []
    rounded = _rounded(formulas[-1]) if exact else None
    value: Value
    if not solved:
        value = Item(())
    elif exact and rounded is None:
        value = _value(exact[-1])
    elif rounded is not None and not unknowns(exact[-1]):
        try:
            value = Item(_readings(exact[-1]), rounded=rounded)
        except Unreadable:
            value = Item((rounded.reading,))
    else:
        value = _value(formulas[-1])
    if names:
        return value._replace(name=tuple(names[0]))
    if any(counts) and len(sides) == 2 and not exact and isinstance(value, Item):
        return value._replace(equation=_difference(*sides))
    return value


def _difference(left: Sequence[str], right: Sequence[str]) -> Expr | None:
    try:
        return Sum((_expression(left), negated(_expression(right))))
    except Unreadable:
        return None


def _is_name(side: Sequence[str]) -> bool:
    """Also ``(x, y)``, in alphabetical order: ``(y, x) = (3, 4)`` is the point (4, 3)."""
    if side[0] == "(" and "," in side and closing(side) == len(side) - 1:
        parts = _split(side[1:-1], ",")
        order = ["".join(part).replace("\\", "").lower() for part in parts]
        return all(map(is_name, parts)) and order == sorted(order)
    return is_name(side)


def _rounded(side: Sequence[str]) -> Rounded | None:
    """A decimal number with its unit; None for anything else."""
    number = side[side[0] == "-"] if len(side) > (side[0] == "-") else ""
    if not _DECIMAL.fullmatch(number):
        return None
    try:
        reading = _readings(side)[0]
    except Unreadable:
        return None
    match reading.value:
        case Num() | Product((Num(), Sym("deg" | "%")), ()):
            return Rounded(reading, Fraction(1, 2 * 10 ** len(number.partition(".")[2])))
    return None


def _value(tokens: Sequence[str]) -> Value:
    inside = tokens
    while len(inside) > 1 and inside[0] == "{" and closing(inside) == len(inside) - 1:
        inside = inside[1:-1]
    if inside is not tokens:
        return parse(inside)
    if tokens and tokens[0] in ("(", "[", "\\{") and closing(tokens) == len(tokens) - 1:
        inner = tokens[1:-1]
        if len(elements := _split(inner, ",")) > 1:
            ends = ("", "") if tokens[0] == "\\{" else (tokens[0], tokens[-1])
            return Many(*ends, tuple(parse(element) for element in elements))
        if tokens[0] == "\\{":
            return parse(inner)
    if len(ratio := _split(tokens, ":")) > 2:
        return _ratio(ratio)
    if len(tokens) == 1 and tokens[0].isalpha() and len(tokens[0]) > 1:
        raise Unreadable("a word is compared as a word")
    return Item(_readings(tokens))


def _ratio(parts: Sequence[Sequence[str]]) -> Many:
    """``2:4:6`` as what it says: the second is twice the first, the third three times."""
    items = [_readings(part)[0] for part in parts]
    if any(item.unit for item in items):
        return Many(":", ":", tuple(Item((item,)) for item in items))
    first = items[0].value
    return Many(":", ":", tuple(Item((Reading(Product((item.value,), (first,)), None),)) for item in items[1:]))


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


def _readings(tokens: Sequence[str]) -> tuple[Reading, ...]:
    """The whole as an expression, or an expression and the unit behind it."""
    for start in range(1, len(tokens)):
        token, before = tokens[start], tokens[start - 1]
        if not (token[0].isalpha() or token[0] == TEXT or (token == "{" and before[0].isdigit())):
            continue
        if before in ("^", "_", "+", "-", "*", "/"):
            continue
        unit = read_unit(tokens[start:])
        if unit is None and token[0] == TEXT and start == len(tokens) - 1:
            unit = label(token.strip(TEXT))
        if unit is None or closing(("(", *tokens[:start], ")")) != start + 1:
            continue
        try:
            value = _expression(tokens[:start])
        except Unreadable:
            continue
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
