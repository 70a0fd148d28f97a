"""High-precision evaluation for what has no exact form: nested roots, sines, large polynomials."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from decimal import Context, Decimal, DecimalException, DivisionByZero, InvalidOperation, Overflow, localcontext
from fractions import Fraction
from functools import lru_cache

from dapo.rewards.exact import MAX_EXPONENT, Undefined
from dapo.rewards.tree import Call, Expr, Num, Power, Product, Sum, Sym

DIGITS = 100
"""Significant decimal digits carried."""
TOLERANCE = Decimal("1e-40")
"""Two values are equal if they differ by less, relative to the larger one and to 1."""
LARGEST = Decimal("1e40")
"""Values beyond this are refused, so that cancellation leaves far more digits than the tolerance asks for."""
LARGEST_ANGLE = Decimal("1e6")
"""Radians."""

PI = Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798214808651"
)
DEGREE = Context(prec=DIGITS).divide(PI, 180)
_CONTEXT = Context(prec=DIGITS, Emax=9999, Emin=-9999, traps=[Overflow, DivisionByZero, InvalidOperation])


def precision() -> AbstractContextManager[Context]:
    """The decimal context that values are worked out in."""
    return localcontext(_CONTEXT)


def value(expression: Expr, constants: Mapping[str, Decimal]) -> Decimal:
    """The value to about `DIGITS` digits, with `constants` put in for the names they hold.

    Variables get fixed values between 1 and 2 whose digits come from a hash: two different formulas agree there only
    by a coincidence of 40 digits.

    Raises:
        Undefined: it has no real value or is beyond the limits.
    """
    with precision():
        try:
            return _value(expression, constants)
        except DecimalException as error:
            raise Undefined(f"no value: {error!r}") from None


def close(a: Decimal, b: Decimal, scale: Fraction, distance: Fraction = Fraction(0)) -> bool:
    """Whether scale * a and b agree to the tolerance, or are no further apart than `distance`."""
    with precision():
        a *= _decimal(scale)
        return abs(a - b) <= _decimal(distance) + TOLERANCE * max(abs(a), abs(b), Decimal(1))


def _value(expression: Expr, constants: Mapping[str, Decimal]) -> Decimal:
    match expression:
        case Num(number):
            result = _decimal(number)
        case Sym(name):
            result = constants[name] if name in constants else variable(name)
        case Product(factors, divisors):
            result = Decimal(1)
            for factor in factors:
                result *= _value(factor, constants)
            for divisor in divisors:
                result /= _value(divisor, constants)
        case Sum(terms):
            result = sum((_value(term, constants) for term in terms), Decimal(0))
        case Power(base, exponent):
            result = _power(_value(base, constants), _value(exponent, constants))
        case Call(function, argument):
            result = _call(function, _value(argument, constants))
    if abs(result) > LARGEST:
        raise Undefined(f"a number beyond {LARGEST}")
    return result


@lru_cache(maxsize=256)
def variable(name: str) -> Decimal:
    """The value a variable is tried at."""
    digest = hashlib.sha512(name.encode("utf-8", "replace")).hexdigest()
    return 1 + Decimal(f"0.{int(digest, 16) % 10**60:060d}")


def _decimal(number: Fraction) -> Decimal:
    return Decimal(number.numerator) / Decimal(number.denominator)


def _power(base: Decimal, power: Decimal) -> Decimal:
    if abs(power) > MAX_EXPONENT:
        raise Undefined(f"exponents end at {MAX_EXPONENT}")
    fraction = Fraction(power).limit_denominator(MAX_EXPONENT)
    rational = abs(_decimal(fraction) - power) < TOLERANCE
    if base == 0:
        if power <= 0:
            raise Undefined("0 to a power that is not positive")
        return Decimal(0)
    if rational and fraction.denominator == 1:
        return base**fraction.numerator
    sign = 1
    if base < 0:
        if not rational or fraction.denominator % 2 == 0:
            raise Undefined("a root of a negative number")
        sign = -1 if fraction.numerator % 2 else 1
    if rational and fraction.denominator == 2:
        return abs(base).sqrt() ** fraction.numerator
    return sign * (abs(base).ln() * power).exp()


def _call(function: str, angle: Decimal) -> Decimal:
    sine = _sine(angle)
    if function == "sin":
        return sine
    cosine = _sine(angle + PI / 2)
    if function == "cos":
        return cosine
    if abs(cosine) < TOLERANCE:
        raise Undefined("the tangent of a right angle")
    return sine / cosine


def _sine(angle: Decimal) -> Decimal:
    """Taylor series after reduction to half a turn."""
    if abs(angle) > LARGEST_ANGLE:
        raise Undefined(f"angles end at {LARGEST_ANGLE}")
    turn = 2 * PI
    angle -= turn * (angle / turn).to_integral_value()
    term = total = angle
    square, order = angle * angle, 1
    while abs(term) > Decimal(f"1e-{DIGITS}"):
        term *= -square / ((order + 1) * (order + 2))
        total += term
        order += 2
    return total
