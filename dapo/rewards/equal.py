"""Whether two answers are the same: exactly where an exact form exists, else to 40 digits."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

from dapo.rewards import numeric
from dapo.rewards.exact import ONE, Evaluation, Inexact, Polynomial, Ratio, Undefined
from dapo.rewards.expression import Unreadable
from dapo.rewards.grammar import Item, Reading, Rounded, Value, parse
from dapo.rewards.latex import MAX_CHARS, TEXT, tokens
from dapo.rewards.tree import Expr, marks
from dapo.rewards.units import conversion, fits_any

_PLAIN = re.compile(r"-?[0-9]{1,40}(?:\.[0-9]{0,40})?")
_BOXED = re.compile(r"\\boxed\{(.*)\}", re.DOTALL)
_CHOICE = re.compile(r"(?:(?:option|choice|answer)(?: :)? )?(?:\( ([a-z]) \)|([a-z])(?: [).:])?)", re.IGNORECASE)
_LABEL = re.compile(r"\( [A-H] \)|[A-H] [).:]")
_LABELLED = re.compile(rf"({_LABEL.pattern}) (?![+*/^=_)])")

_T = TypeVar("_T")

_DEGREE: Polynomial = {frozenset((("pi", Fraction(1)),)): Fraction(1, 180)}
_HUNDREDTH: Polynomial = {frozenset(): Fraction(1, 100)}


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


# The samples of one prompt share its ground truth, and many of them an answer.
@lru_cache(maxsize=4096)
def _compare(given: str, truth: str) -> bool:
    expected, found = _understood(truth), _found(given)
    if expected is None or found is None:
        return False
    if _same(found, *expected):
        return True
    choice, choices = _labelled(found), _labelled(expected[0])
    if choice and choices:
        return choice[0] == choices[0] and _same(choice[1], choices[1], _value(choices[1]))
    return any(_same(part, *expected) for part in choice) or any(_same(found, part, _value(part)) for part in choices)


def _same(found: list[str], expected: list[str], value: Value | None) -> bool:
    if _letters(found) == _letters(expected):
        return True
    answer = None if value is None else _value(found)
    return value is not None and answer is not None and _Comparison().same_value(answer, value)


@lru_cache(maxsize=1024)
def _understood(truth: str) -> tuple[list[str], Value | None] | None:
    found = _found(truth)
    return None if found is None else (found, _value(found))


def _found(raw: str) -> list[str] | None:
    """Tokens, without a box or the brackets of a choice round them."""
    boxed = _BOXED.fullmatch(raw)
    found = tokens(boxed[1] if boxed else raw)
    if found and len(found) <= 5 and (choice := _CHOICE.fullmatch(_spaced(found))) is not None:
        return [choice[1] or choice[2]]
    return found


def _labelled(found: list[str]) -> tuple[list[str], list[str]] | tuple[()]:
    """The letter and the value of ``C. 48`` and ``(C) 48``: either may have been asked for."""
    if found[0] != "(" and not (len(found[0]) == 1 and found[0].isupper()):
        return ()
    label = _LABELLED.match(_spaced(found))
    rest = found[len(label[1].split()) :] if label else []
    # "B. 3, C. 4" chooses nothing.
    return ([label[1].strip("(). :")], rest) if label and not _LABEL.search(_spaced(rest)) else ()


def _spaced(found: list[str]) -> str:
    return " ".join(token.strip(TEXT) for token in found)


def _letters(found: list[str]) -> list[str]:
    """Tokens in lower case: equal letters mean equal answers, also for what is outside the grammar."""
    return [word for token in found for word in token.strip(TEXT).lower().split()]


def _value(found: list[str]) -> Value | None:
    """What the tokens mean; None where they are outside the grammar and can be compared by their letters only."""
    try:
        return parse(found)
    except Unreadable:
        return None


class _Meaning:
    """Values of expressions with one meaning of the marks ``deg`` and ``%``, each worked out once."""

    def __init__(self, exact: dict[str, Polynomial], decimal: dict[str, Decimal]) -> None:
        self._evaluation, self._constants = Evaluation(exact), decimal | {"pi": numeric.PI}
        self._exact: dict[int, Ratio | type[ArithmeticError]] = {}
        self._decimal: dict[int, Decimal | type[ArithmeticError]] = {}

    def same(self, a: Expr, b: Expr, scale: Fraction) -> bool:
        """Whether scale * a = b; never for what has no value."""
        try:
            try:
                scaled = self._evaluation.multiply(self._exactly(a), ({frozenset(): scale}, ONE))
                return self._evaluation.equal(scaled, self._exactly(b))
            except Inexact:
                return numeric.close(self._closely(a), self._closely(b), scale)
        except Undefined:
            return False

    def near(self, a: Expr, b: Expr, scale: Fraction, distance: Fraction) -> bool:
        """Whether scale * a is within the distance of b; never for what has no value."""
        try:
            return numeric.close(self._closely(a), self._closely(b), scale, distance)
        except Undefined:
            return False

    def _exactly(self, expression: Expr) -> Ratio:
        return _once(self._exact, expression, self._evaluation.value)

    def _closely(self, expression: Expr) -> Decimal:
        return _once(self._decimal, expression, lambda e: numeric.value(e, self._constants))


def _once(known: dict[int, _T | type[ArithmeticError]], expression: Expr, work_out: Callable[[Expr], _T]) -> _T:
    """A value, or the reason why there is none, from `known` or worked out now."""
    if id(expression) not in known:
        try:
            known[id(expression)] = work_out(expression)
        except ArithmeticError as error:
            known[id(expression)] = type(error)
    found = known[id(expression)]
    if isinstance(found, type):
        raise found
    return found


class _Comparison:
    """Of two answers. A list of hard expressions costs each of them once, however many pairs are tried."""

    def __init__(self) -> None:
        # 65 degrees is an angle and 25 % a quarter; and 65 is as good an answer to "how many degrees".
        self._measure = _Meaning({"deg": _DEGREE, "%": _HUNDREDTH}, {"deg": numeric.DEGREE, "%": Decimal("0.01")})
        self._label = _Meaning({"deg": ONE, "%": ONE}, {"deg": Decimal(1), "%": Decimal(1)})

    def same_value(self, a: Value, b: Value) -> bool:
        """Whether two values are equal, element by element; the order counts inside brackets only."""
        if isinstance(a, Item) and isinstance(b, Item):
            return self._same_item(a, b)
        if isinstance(a, Item) or isinstance(b, Item) or len(a.elements) != len(b.elements):
            return False
        if (a.opening, a.closing) != (b.opening, b.closing):
            return False
        if a.opening:
            return all(map(self.same_value, a.elements, b.elements))
        left = list(b.elements)
        for element in a.elements:
            match = next((i for i, other in enumerate(left) if self._same_element(element, other)), None)
            if match is None:
                return False
            del left[match]
        return True

    def _same_element(self, a: Value, b: Value) -> bool:
        """In a list (x = 3, y = 4) the names identify the values."""
        return not (a.name and b.name and a.name != b.name) and self.same_value(a, b)

    def _same_item(self, given: Item, truth: Item) -> bool:
        """An equation in several unknowns can name its value (``DE + EF = 10``), but only an equation is one."""
        if truth.equation is not None:
            left, right = given.equation, truth.equation
            return left is not None and any(self._same_number(left, right, Fraction(s)) for s in (1, -1))
        return any(self._same_reading(x, y) for x in self._claims(given) for y in self._claims(truth))

    def _claims(self, item: Item) -> tuple[Reading, ...]:
        if item.rounded is not None and any(self._rounds(reading, item.rounded) for reading in item.readings):
            return (*item.readings, item.rounded.reading)
        return item.readings

    def _rounds(self, exact: Reading, rounded: Rounded) -> bool:
        scale = conversion(exact.unit, rounded.reading.unit)
        return scale is not None and self._label.near(exact.value, rounded.reading.value, scale, rounded.half_step)

    def _same_reading(self, a: Reading, b: Reading) -> bool:
        scale = conversion(a.unit, b.unit)
        if scale is None or _unlike(a, b) or _unlike(b, a):
            return False
        return self._same_number(a.value, b.value, scale)

    def _same_number(self, a: Expr, b: Expr, scale: Fraction) -> bool:
        """A mark on one side only may be a label or a measure."""
        one, two = marks(a), marks(b)
        return (one != two and not (one and two) and self._label.same(a, b, scale)) or self._measure.same(a, b, scale)


def _unlike(a: Reading, b: Reading) -> bool:
    """One names a unit and the other is an angle or a share: 48 cm is not 48 degrees."""
    return (
        a.unit is not None and b.unit is None and bool(marks(b.value)) and not marks(a.value) and not fits_any(a.unit)
    )
