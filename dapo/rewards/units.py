"""Units at the end of an answer: read off, and converted where two answers name different ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from dapo.rewards.latex import TEXT


class Unit(NamedTuple):
    """A product of base dimensions, each with its power, and how many base units one of it is."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction


ANY = "any"
"""The dimension of "units": fits every unit of the same power."""

_BASE = (
    # dimension, size in the base unit, spellings
    ("m", "1", "m meter meters metre metres"),
    ("m", "1/100", "cm cms centimeter centimeters centimetre centimetres"),
    ("m", "1/1000", "mm millimeter millimeters millimetre millimetres"),
    ("m", "1/10", "dm decimeter decimeters"),
    ("m", "1000", "km kilometer kilometers kilometre kilometres"),
    ("m", "127/5000", "in inch inches"),
    ("m", "381/1250", "ft foot feet"),
    ("m", "1143/1250", "yd yds yard yards"),
    ("m", "201168/125", "mi mile miles"),
    ("g", "1", "g gm gram grams"),
    ("g", "1000", "kg kilogram kilograms"),
    ("g", "1/1000", "mg milligram milligrams"),
    ("g", "45359237/100000", "lb lbs pound pounds"),
    ("g", "45359237/1600000", "oz ounce ounces"),
    ("s", "1", "s sec secs second seconds"),
    ("s", "60", "min mins minute minutes"),
    ("s", "3600", "h hr hrs hour hours"),
    ("s", "86400", "day days"),
    ("s", "604800", "week weeks"),
    ("month", "1", "month months"),
    ("month", "12", "year years yr yrs"),
    ("celsius", "1", "celsius"),
    ("fahrenheit", "1", "fahrenheit"),
    ("dollar", "1", "dollar dollars"),
    ("dollar", "1/100", "cent cents"),
    (ANY, "1", "unit units"),
)
_VOLUME = {"l": "1/1000", "L": "1/1000", "liter": "1/1000", "liters": "1/1000", "ml": "1/1000000", "mL": "1/1000000"}
_COUNTED = (
    "way point digit integer edge vertex vertices side student people person ticket multiple meal apple cube square "
    "triangle line term"
)
_ABOUT_THE_NUMBER = (
    "no not nor never neither cannot without except is are was were be isn wrong incorrect false invalid impossible "
    "untrue opposite negative but if unless plus minus times more less than over under above below too half twice "
    "double triple squared cubed 不 非 错 没 無 无 未 勿 否 误 半 倍 负"
)
_DENIALS = frozenset(_ABOUT_THE_NUMBER.split())


def only_names(words: Iterable[str]) -> bool:
    """Whether prose beside a number says what it is (area, apples), and nothing about the number (not, half, wrong)."""
    return not any(word.lower() in _DENIALS for word in words)


def label(words: str) -> Unit | None:
    """Prose behind a number (``12 \\text{ apples}``) names what is counted: it must only not contradict."""
    return _counted(words) if only_names(words.split()) else None


def _counted(words: str) -> Unit:
    return Unit(((words.lower(), 1),), Fraction(1))


def _table() -> dict[str, Unit]:
    table = {}
    for name, size, spellings in _BASE:
        for word in spellings.split():
            table[word] = Unit(((name, 1),), Fraction(size))
    for word, size in _VOLUME.items():
        table[word] = Unit((("m", 3),), Fraction(size))
    for word in _COUNTED.split():
        table[word] = table[word + "s"] = _counted(word)
    table["mph"] = Unit((("m", 1), ("s", -1)), Fraction(201168, 125) / 3600)
    return table


UNITS = _table()
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def read_unit(words: Sequence[str]) -> Unit | None:
    """The unit that all of these tokens spell (``cm ^ 2``, ``square feet``, ``km / h``); None: they are no unit."""
    if not words or len(words) > 12:
        return None
    flat: list[str] = []
    for word in words:
        if word.startswith(TEXT):
            flat += word.strip(TEXT).split()
        elif word not in "{}.":
            flat.append(word)
    unit, sign, position = Unit((), Fraction(1)), 1, 0
    while position < len(flat):
        power = _POWERS.get(flat[position].lower(), 0)
        position += power > 0
        if position == len(flat):
            return None
        base = UNITS.get(flat[position]) or (UNITS.get(flat[position].lower()) if len(flat[position]) > 2 else None)
        if base is None:
            return None
        position += 1
        power = power or 1
        if flat[position : position + 1] == ["^"]:
            if position + 1 == len(flat) or flat[position + 1] not in ("2", "3"):
                return None
            power = int(flat[position + 1])
            position += 2
        unit = _times(unit, base, sign * power)
        if position < len(flat):
            if flat[position] not in ("/", "per", "*"):
                return None
            sign = 1 if flat[position] == "*" else -1
            position += 1
            if position == len(flat):
                return None
    return unit if flat else None


def _times(unit: Unit, other: Unit, power: int) -> Unit:
    dimensions = dict(unit.dimensions)
    for name, exponent in other.dimensions:
        dimensions[name] = dimensions.get(name, 0) + exponent * power
    return Unit(tuple(sorted(d for d in dimensions.items() if d[1])), unit.factor * other.factor**power)


def conversion(a: Unit | None, b: Unit | None) -> Fraction | None:
    """What to multiply a value in `a` by to get it in `b`; 1 where one of them names no unit; None: they disagree."""
    if a is None or b is None:
        return Fraction(1)
    if (fits_any(a) or fits_any(b)) and len(a.dimensions) == 1 == len(b.dimensions):
        return Fraction(1) if a.dimensions[0][1] == b.dimensions[0][1] else None
    return a.factor / b.factor if a.dimensions == b.dimensions else None


def fits_any(unit: Unit) -> bool:
    """Whether it is "units", which says the power only."""
    return len(unit.dimensions) == 1 and unit.dimensions[0][0] == ANY
