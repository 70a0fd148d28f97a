"""The grammar of an answer: numbers, fractions, roots, pi, degrees, powers, sums, products, units, tuples, sets.

    answer    = item { "," item } | "(" item "," ... ")" | "{" item ... "}"        (also "or", "and", ";")
    item      = [ name "=" ] expr [ unit ]  |  expr "=" expr
    expr      = term { ("+" | "-") term }
    term      = power { ["*" | "/"] power }                    a missing sign multiplies
    power     = [ "-" ] atom [ "^" exponent ] { "deg" | "%" }
    atom      = number | number \\frac{number}{number} | letter | "(" expr ")" | \\frac arg arg | \\sqrt[n] arg | ...

A recursive-descent parser with one token of lookahead; what it does not know is `Unreadable`, never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, NoReturn

from dapo.rewards.latex import MULTIPLIERS, OPENING, TEXT, closing
from dapo.rewards.units import Unit, label, read_unit

MAX_DEPTH = 24
"""Brackets, roots and exponents inside each other."""
MAX_ITEMS = 20
"""Elements of a list, tuple or set."""
MAX_SCALE = 64
"""Largest decimal exponent in ``1.5e3``."""


class Unreadable(ValueError):
    """The text is outside the grammar or its limits; it can still be compared letter by letter."""


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

_MINUS_ONE = Num(Fraction(-1))
_FUNCTIONS = {"sin", "cos", "tan"}
_VARIABLES = {
    "\\" + name
    for name in (
        "alpha beta gamma delta epsilon varepsilon theta phi varphi lambda mu nu rho sigma tau omega psi chi eta xi "
        "zeta kappa infty ell"
    ).split()
}
_NAMING = _VARIABLES | {"\\angle", "\\triangle", "\\overline", "\\measuredangle", "\\widehat", "\\deg", "\\odot", "\\pi"}
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
    if len(sides) == 1:
        return Item(_readings(sides[0]))
    first, last = sides[0], sides[-1]
    if _is_name(first):
        return Item(_readings(last), tuple(first))
    if len(sides) == 2 and _is_name(last):
        return Item(_readings(first), tuple(last))
    if len(sides) == 2:
        difference = Sum((_expression(first), _negative(_expression(last))))
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
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.position < len(parser.tokens):
        parser.refuse()
    return value


def _negative(value: Expr) -> Expr:
    return Num(-value.value) if isinstance(value, Num) else Product((_MINUS_ONE, value), ())


def _ends(factor: Expr) -> bool:
    """After a root, a fraction or pi a number can only be a factor (``\\sqrt{3} 5``)."""
    return isinstance(factor, Power | Product) or factor == Sym("pi")


class _Parser:
    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self.position = 0
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.position += 1
        return True

    def refuse(self) -> NoReturn:
        raise Unreadable(f"{self.peek() or 'the end'} is not expected at token {self.position}")

    def nested(self, read: Callable[[], Expr], closing: str = "") -> Expr:
        """`read`, one level deeper, and then the closing bracket."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"more than {MAX_DEPTH} levels deep")
        value = read()
        self.depth -= 1
        if closing and not self.accept(closing):
            self.refuse()
        return value

    def sum(self) -> Expr:
        terms = [self.term()]
        while (sign := self.peek()) in ("+", "-"):
            self.position += 1
            term = self.term()
            terms.append(term if sign == "+" else _negative(term))
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def term(self) -> Expr:
        first = self.power()
        factors, divisors = [first], []
        while True:
            token = self.peek()
            if token == "*":
                self.position += 1
                factors.append(self.power())
            elif token == "/":
                self.position += 1
                divisors.append(self.power())
            elif self.may_multiply(token) or (token[:1].isdigit() and not divisors and _ends(factors[-1])):
                factors.append(self.power())
            else:
                break
        return first if len(factors) == 1 and not divisors else Product(tuple(factors), tuple(divisors))

    def may_multiply(self, token: str) -> bool:
        """Whether this begins a factor without a sign before it; a number does not: ``4 8`` is not 32."""
        return token in ("(", "[", "{", "\\frac", "\\sqrt", "\\pi") or bool(token) and (
            token in _VARIABLES or token[0].isalpha() or token[1:] in _FUNCTIONS and token[0] == "\\"
        )

    def power(self) -> Expr:
        value = self.signed()
        while (mark := self.peek()) in ("\\deg", "%"):
            self.position += 1
            value = Product((value, Sym(mark.removeprefix("\\"))), ())
        return value

    def signed(self) -> Expr:
        """An atom with its signs and its exponent; the exponent binds closer and may be a power itself."""
        negative = False
        while self.peek() in ("-", "+"):
            negative ^= self.peek() == "-"
            self.position += 1
        value = self.atom()
        if self.power_sign():
            value = Power(value, self.nested(self.signed))
        return _negative(value) if negative else value

    def power_sign(self) -> bool:
        if self.accept("^"):
            return True
        if self.tokens[self.position : self.position + 2] == ["*", "*"]:
            self.position += 2
            return True
        return False

    def atom(self) -> Expr:
        token = self.peek()
        if not token:
            self.refuse()
        self.position += 1
        if token[0] in "0123456789" or token[0] == "." and len(token) > 1:
            return self.mixed(token)
        if token in ("(", "[", "{"):
            return self.nested(self.sum, OPENING[token])
        if token == "\\pi":
            return Sym("pi")
        if token == "\\frac":
            return Product((self.argument(),), (self.argument(),))
        if token == "\\sqrt":
            degree = self.nested(self.sum, "]") if self.accept("[") else Num(Fraction(2))
            return Power(self.argument(), Product((Num(Fraction(1)),), (degree,)))
        if token in ("sqrt", "cbrt"):
            return Power(self.nested(self.atom), Num(Fraction(1, 2 if token == "sqrt" else 3)))
        if token in MULTIPLIERS:
            return Num(Fraction(MULTIPLIERS[token]))
        name = token.removeprefix("\\")
        if name in _FUNCTIONS:
            return Call(name, self.nested(self.angle))
        if token in _VARIABLES or token[0].isalpha() and len(token) == 1:
            return Sym(token + self.index())
        if token[0].isalpha() and len(token) == 2:
            return Product((Sym(token[0]), Sym(token[1] + self.index())), ())
        self.position -= 1
        self.refuse()

    def index(self) -> str:
        """The subscript of a variable."""
        if not self.accept("_"):
            return ""
        group = self.accept("{")
        token = self.peek()
        if not token.isalnum():
            self.refuse()
        self.position += 1
        if group and not self.accept("}"):
            self.refuse()
        return "_" + token

    def angle(self) -> Expr:
        """What a function without brackets applies to: factors up to a sign or the next function."""
        factors = [self.power()]
        while self.may_multiply(token := self.peek()) and token.removeprefix("\\") not in _FUNCTIONS:
            factors.append(self.power())
        return factors[0] if len(factors) == 1 else Product(tuple(factors), ())

    def argument(self) -> Expr:
        """What LaTeX takes for an argument: a group, one digit, or one command."""
        if self.accept("{"):
            return self.nested(self.sum, "}")
        token = self.peek()
        if token.isdigit():
            self.tokens[self.position : self.position + 1] = [token[0], token[1:]] if len(token) > 1 else [token]
            self.position += 1
            return Num(Fraction(int(token[0])))
        if token.isalpha() and len(token) == 1 or token == "(" or token[:1] == "\\":
            return self.nested(self.atom)
        self.refuse()

    def mixed(self, token: str) -> Expr:
        """A number, or a whole number and a proper fraction behind it."""
        whole = _number(token)
        rest = self.tokens[self.position : self.position + 7]
        numerator = denominator = ""
        if len(rest) >= 3 and rest[0].isdigit() and rest[1] == "/" and rest[2].isdigit():
            numerator, denominator, used = rest[0], rest[2], 3
        elif len(rest) == 7 and rest[0] == "\\frac" and rest[1] == rest[4] == "{" and rest[3] == rest[6] == "}":
            numerator, denominator, used = rest[2], rest[5], 7
        elif len(rest) >= 2 and rest[0] == "\\frac" and rest[1].isdigit() and len(rest[1]) == 2:
            numerator, denominator, used = rest[1][0], rest[1][1], 2
        if token.isdigit() and numerator.isdigit() and denominator.isdigit() and 0 < int(numerator) < int(denominator):
            self.position += used
            return Num(whole + Fraction(int(numerator), int(denominator)))
        return Num(whole)


def _number(token: str) -> Fraction:
    mantissa, _, exponent = token.lower().partition("e")
    if exponent and (len(exponent) > 4 or abs(int(exponent)) > MAX_SCALE):
        raise Unreadable(f"the exponent of {token[:40]} is beyond {MAX_SCALE}")
    digits = mantissa.rstrip(".") or "0"
    value = Fraction(int(digits)) if digits.isdigit() else _decimal(digits)
    return value * Fraction(10) ** int(exponent) if exponent else value


def _decimal(digits: str) -> Fraction:
    whole, _, part = digits.partition(".")
    return Fraction(int(whole + part), 10 ** len(part))
