"""What an expression is made of."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Num:
    value: Fraction


@dataclass(frozen=True, slots=True)
class Sym:
    """A variable, or one of the constants ``pi``, ``deg`` and ``%``."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    terms: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Product:
    factors: tuple[Expr, ...]
    divisors: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Power:
    base: Expr
    exponent: Expr


@dataclass(frozen=True, slots=True)
class Call:
    """``sin``, ``cos`` or ``tan`` of an angle in radians."""

    function: str
    argument: Expr


Expr = Num | Sym | Sum | Product | Power | Call

_MINUS_ONE = Num(Fraction(-1))


def negated(value: Expr) -> Expr:
    """-value."""
    return Num(-value.value) if isinstance(value, Num) else Product((_MINUS_ONE, value), ())


def marks(expression: Expr) -> frozenset[str]:
    """Which of the marks ``deg`` and ``%`` are in it."""
    match expression:
        case Sym("deg" | "%" as mark):
            return frozenset((mark,))
        case Num() | Sym():
            return frozenset()
        case Sum(terms):
            return frozenset().union(*map(marks, terms))
        case Product(factors, divisors):
            return frozenset().union(*map(marks, factors), *map(marks, divisors))
        case Power(base, exponent):
            return marks(base) | marks(exponent)
        case Call(_, argument):
            return marks(argument)
