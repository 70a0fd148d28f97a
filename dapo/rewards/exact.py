"""Exact values: quotients of sums of rational multiples of products of roots of primes, pi and variables.

Different products of fractional powers of primes are linearly independent over the rationals (Besicovitch 1940), and
pi is transcendental, so in this form two values are equal exactly if their terms are. Variables stand for positive
numbers: sqrt(x^2) is x.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import isqrt

from dapo.rewards.tree import Call, Expr, Num, Power, Product, Sum, Sym

Monomial = frozenset[tuple[int | str, Fraction]]
"""Primes with exponents in (0, 1), names with any exponent but 0."""
Polynomial = dict[Monomial, Fraction]
"""Coefficients, none of them 0; zero has no terms."""
Ratio = tuple[Polynomial, Polynomial]
"""Numerator and denominator; the denominator is not zero."""

MAX_EXPONENT = 64
"""Largest numerator and denominator of an exponent."""
MAX_BITS = 1024
"""Largest coefficient."""
MAX_WORK = 1000
"""Products of two terms per comparison; what needs more is evaluated numerically instead (after about 10 ms)."""
MAX_TRIAL = 10_000
"""Primes tried when a radicand is factored; complete for radicands up to its square."""

_UNIT: Monomial = frozenset()
ONE: Polynomial = {_UNIT: Fraction(1)}


class Undefined(ArithmeticError):
    """The expression has no real value, or one beyond the limits: it equals nothing."""


class Inexact(ArithmeticError):
    """The value is outside this form; evaluate it numerically."""


class Evaluation:
    """The arithmetic of one comparison, with a limit to its work.

    All methods raise `Inexact` where the result is outside the form or too laborious, and `Undefined` for division by
    zero, an even root of a negative number, an exponent or a number beyond the limits.
    """

    def __init__(self, constants: Mapping[str, Polynomial]) -> None:
        """`constants` are put in for the names they hold."""
        self.constants = constants
        self.work = 0

    def value(self, expression: Expr) -> Ratio:
        match expression:
            case Num(value):
                return ({_UNIT: value} if value else {}), ONE
            case Sym(name):
                return self.constants.get(name) or {frozenset(((name, Fraction(1)),)): Fraction(1)}, ONE
            case Product(factors, divisors):
                result: Ratio = ONE, ONE
                for factor in factors:
                    result = self.multiply(result, self.value(factor))
                for divisor in divisors:
                    result = self.multiply(result, self.inverse(self.value(divisor)))
                return result
            case Sum(terms):
                result = {}, ONE
                for term in terms:
                    result = self.add(result, self.value(term))
                return result
            case Power(base, exponent):
                return self.power(self.value(base), _rational(self.value(exponent)))
            case Call():
                raise Inexact("a function")

    def equal(self, a: Ratio, b: Ratio) -> bool:
        """Whether two values are the same number (or the same function of the variables)."""
        return self._product(a[0], b[1]) == self._product(b[0], a[1])

    def add(self, a: Ratio, b: Ratio) -> Ratio:
        if a[1] == b[1]:
            return _sum(a[0], b[0]), a[1]
        return _sum(self._product(a[0], b[1]), self._product(b[0], a[1])), self._product(a[1], b[1])

    def multiply(self, a: Ratio, b: Ratio) -> Ratio:
        return self._product(a[0], b[0]), self._product(a[1], b[1])

    def inverse(self, a: Ratio) -> Ratio:
        """1 / a; a single term moves into the numerator, so that most values keep the denominator 1."""
        numerator, denominator = a
        if not numerator:
            raise Undefined("division by zero")
        if len(numerator) == 1:
            ((monomial, coefficient),) = numerator.items()
            reciprocal = _normal({atom: -exponent for atom, exponent in monomial}, 1 / coefficient)
            return self._product(denominator, reciprocal), ONE
        return denominator, numerator

    def power(self, base: Ratio, exponent: Fraction) -> Ratio:
        numerator, denominator = base
        if exponent < 0:
            return self.power(self.inverse(base), -exponent)
        if exponent == 0:
            if not numerator:
                raise Undefined("0 to the power of 0")
            return ONE, ONE
        if not numerator:
            return base
        if len(numerator) == 1 and denominator == ONE:
            return _power_of_term(numerator, exponent), ONE
        if exponent.denominator > 1:
            raise Inexact("a root of a sum")
        result: Ratio = ONE, ONE
        for _ in range(exponent.numerator):
            result = self.multiply(result, base)
        return result

    def _product(self, a: Polynomial, b: Polynomial) -> Polynomial:
        if b is ONE:
            return a
        if a is ONE:
            return b
        self.work += len(a) * len(b)
        if self.work > MAX_WORK:
            raise Inexact("too many terms")
        total: Polynomial = {}
        for left, x in a.items():
            for right, y in b.items():
                if left and right:
                    powers = dict(left)
                    for atom, exponent in right:
                        powers[atom] = powers.get(atom, Fraction(0)) + exponent
                    ((monomial, value),) = _normal(powers, x * y).items()
                else:
                    monomial, value = left or right, x * y
                total[monomial] = _small(total.get(monomial, Fraction(0)) + value)
        return {monomial: value for monomial, value in total.items() if value}


def _rational(a: Ratio) -> Fraction:
    """The value as an exponent."""
    numerator, denominator = a
    if denominator.keys() != ONE.keys() or not numerator.keys() <= ONE.keys():
        raise Inexact("an exponent that is not rational")
    value = numerator.get(_UNIT, Fraction(0)) / denominator[_UNIT]
    if abs(value.numerator) > MAX_EXPONENT or value.denominator > MAX_EXPONENT:
        raise Undefined(f"exponents end at {MAX_EXPONENT}")
    return value


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    total = dict(a)
    for monomial, coefficient in b.items():
        total[monomial] = _small(total.get(monomial, Fraction(0)) + coefficient)
    return {monomial: value for monomial, value in total.items() if value}


def _small(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise Undefined("a number beyond the limits")
    return value


def _power_of_term(base: Polynomial, exponent: Fraction) -> Polynomial:
    """A single term to a positive power."""
    ((monomial, coefficient),) = base.items()
    if max(coefficient.numerator.bit_length(), coefficient.denominator.bit_length()) * exponent > MAX_BITS:
        raise Undefined("a number beyond the limits")
    powers = {atom: power * exponent for atom, power in monomial}
    if exponent.denominator == 1:
        return _normal(powers, coefficient**exponent.numerator)
    if coefficient < 0 and exponent.denominator % 2 == 0:
        raise Undefined("an even root of a negative number")
    for number, direction in ((abs(coefficient.numerator), exponent), (coefficient.denominator, -exponent)):
        for prime, count in prime_factors(number).items():
            powers[prime] = powers.get(prime, Fraction(0)) + count * direction
    return _normal(powers, Fraction(-1 if coefficient < 0 and exponent.numerator % 2 else 1))


def _normal(powers: dict[int | str, Fraction], coefficient: Fraction) -> Polynomial:
    """One term; whole powers of primes go into its coefficient."""
    rest = []
    for atom, exponent in powers.items():
        if isinstance(atom, int):
            whole = exponent.numerator // exponent.denominator
            if whole:
                coefficient = _small(coefficient * Fraction(atom) ** whole)
                exponent -= whole
        if exponent:
            rest.append((atom, exponent))
    return {frozenset(rest): coefficient}


@lru_cache(maxsize=1024)
def prime_factors(number: int) -> Mapping[int, int]:
    """Prime factors of a positive integer with their counts.

    Raises:
        Inexact: a factor is left that might not be prime.
    """
    factors: dict[int, int] = {}
    prime = 2
    while prime <= MAX_TRIAL and prime * prime <= number:
        while number % prime == 0:
            factors[prime] = factors.get(prime, 0) + 1
            number //= prime
        prime += 1 if prime == 2 else 2
    if number > MAX_TRIAL**2:
        root = isqrt(number)
        if root * root != number or root > MAX_TRIAL**2:
            raise Inexact("a radicand that is hard to factor")
        factors[root] = 2
    elif number > 1:
        factors[number] = factors.get(number, 0) + 1
    return factors
