"""Whether two answers are the same: exactly where an exact form exists, else to 40 digits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from dapo.rewards import numeric
from dapo.rewards.exact import Evaluation, Inexact, Polynomial, Undefined
from dapo.rewards.grammar import Call, Expr, Item, Many, Num, Power, Product, Sum, Sym, Unreadable, Value, parse
from dapo.rewards.latex import MAX_CHARS, TEXT, tokens
from dapo.rewards.units import conversion

_PLAIN = re.compile(r"-?[0-9]{1,40}(?:\.[0-9]{0,40})?")
_BOXED = re.compile(r"\\boxed\{(.*)\}", re.DOTALL)
_CHOICE = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[).:]")

_RATIONAL_ONE: Polynomial = {frozenset(): Fraction(1)}
_HUNDREDTH: Polynomial = {frozenset(): Fraction(1, 100)}
_DEGREE: Polynomial = {frozenset((("pi", Fraction(1)),)): Fraction(1, 180)}


class _Constants(NamedTuple):
    """What the marks ``deg`` and ``%`` stand for."""

    exact: Mapping[str, Polynomial]
    numeric: Mapping[str, Decimal]


_MEASURE = _Constants(
    {"deg": _DEGREE, "%": _HUNDREDTH}, {"deg": numeric.DEGREE, "%": Decimal("0.01"), "pi": numeric.PI}
)
"""65 degrees is an angle, 25 % is a quarter."""
_LABEL = _Constants(
    {"deg": _RATIONAL_ONE, "%": _RATIONAL_ONE}, {"deg": Decimal(1), "%": Decimal(1), "pi": numeric.PI}
)
"""65 degrees answers "how many degrees", for which 65 is as good."""


class Answer(NamedTuple):
    """What was understood of an answer."""

    letters: tuple[str, ...]
    """Its tokens in lower case; equal letters mean equal answers."""
    value: Value | None
    """None: outside the grammar, comparable by its letters only."""


def equivalent(given: str, truth: str) -> bool:
    """Whether the model's answer equals the ground truth.

    Values are compared exactly (roots, pi, fractions, variables); what has no exact form (roots of sums, sines) to a
    relative `numeric.TOLERANCE` of 1e-40. Nothing is rounded: 8.66 is not 5 sqrt(3). An empty answer is never right.
    Takes any two strings, raises nothing; time is linear in their length beyond `latex.MAX_CHARS` and bounded below.
    """
    given, truth = given.strip(), truth.strip()
    if not given or not truth:
        return False
    if given == truth:
        return True
    if _PLAIN.fullmatch(given) and _PLAIN.fullmatch(truth):
        return Decimal(given) == Decimal(truth)
    if len(given) > MAX_CHARS or len(truth) > MAX_CHARS:
        return False
    return _compare(given, truth)


def read(raw: str) -> Answer | None:
    """Understand an answer; None where it is empty, too long, or not text."""
    boxed = _BOXED.fullmatch(raw)
    found = tokens(boxed[1] if boxed else raw)
    if found is None:
        return None
    if (choice := _CHOICE.fullmatch("".join(found))) is not None:
        found = [choice[1] or choice[2]]
    letters = tuple(word for token in found for word in token.strip(TEXT).lower().split())
    try:
        return Answer(letters, parse(found))
    except Unreadable:
        return Answer(letters, None)


# The samples of one prompt share its ground truth, and many of them an answer.
@lru_cache(maxsize=4096)
def _compare(given: str, truth: str) -> bool:
    expected = _read_truth(truth)
    answer = read(given)
    return answer is not None and expected is not None and _same_answer(answer, expected)


@lru_cache(maxsize=1024)
def _read_truth(raw: str) -> Answer | None:
    return read(raw)


def _same_answer(a: Answer, b: Answer) -> bool:
    if a.letters == b.letters:
        return True
    return a.value is not None and b.value is not None and _same_value(a.value, b.value)


def _same_value(a: Value, b: Value) -> bool:
    if isinstance(a, Item) and isinstance(b, Item):
        return _same_item(a, b)
    if isinstance(a, Item) or isinstance(b, Item) or len(a.elements) != len(b.elements):
        return False
    if (a.opening, a.closing) != (b.opening, b.closing):
        return False
    if a.opening:
        return all(map(_same_value, a.elements, b.elements))
    left = list(b.elements)
    for element in a.elements:
        match = next((i for i, other in enumerate(left) if _same_named(element, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_named(a: Value, b: Value) -> bool:
    """In a list (x = 3, y = 4) the names tell which is which."""
    if isinstance(a, Item) and isinstance(b, Item) and a.name and b.name and a.name != b.name:
        return False
    return _same_value(a, b)


def _same_item(a: Item, b: Item) -> bool:
    if a.equation or b.equation:
        left, right = a.readings[0].value, b.readings[0].value
        return a.equation == b.equation and (_same_number(left, right) or _same_number(left, right, Fraction(-1)))
    for x in a.readings:
        for y in b.readings:
            scale = conversion(x.unit, y.unit)
            if scale is not None and _same_number(x.value, y.value, scale):
                return True
    return False


def _same_number(a: Expr, b: Expr, scale: Fraction = Fraction(1)) -> bool:
    """Whether scale * a = b. A degree or percent sign on one side only may be a label or a measure."""
    return (_marks(a) != _marks(b) and _agree(a, b, scale, _LABEL)) or _agree(a, b, scale, _MEASURE)


def _agree(a: Expr, b: Expr, scale: Fraction, constants: _Constants) -> bool:
    exact = Evaluation(constants.exact)
    try:
        try:
            left = exact.multiply(exact.value(a), ({frozenset(): scale}, _RATIONAL_ONE))
            return exact.equal(left, exact.value(b))
        except Inexact:
            return numeric.close(a, b, constants.numeric, scale)
    except Undefined:
        return False


def _marks(expression: Expr) -> frozenset[str]:
    match expression:
        case Sym("deg" | "%" as mark):
            return frozenset((mark,))
        case Num() | Sym():
            return frozenset()
        case Sum(terms):
            return frozenset().union(*map(_marks, terms))
        case Product(factors, divisors):
            return frozenset().union(*map(_marks, factors), *map(_marks, divisors))
        case Power(base, exponent):
            return _marks(base) | _marks(exponent)
        case Call(_, argument):
            return _marks(argument)
