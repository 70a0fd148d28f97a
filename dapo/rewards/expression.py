"""Expressions: numbers, fractions, roots, pi, degrees, powers, sums and products.

    sum       = term { ("+" | "-") term }
    term      = power { ["*" | "/"] power }                    a missing sign multiplies
    power     = { "-" } atom [ "^" power ] { "deg" | "%" }      a repeated mark counts once
    atom      = number | number \\frac{number}{number} | letter | "(" sum ")" | \\frac arg arg | \\sqrt[n] arg | sin ...
                | number \\overline{digits} | "{" sum \\over sum "}"

A recursive-descent parser with one token of lookahead; what it does not know is `Unreadable`, never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NoReturn

from dapo.rewards.latex import MULTIPLIERS, OPENING
from dapo.rewards.tree import Call, Expr, Num, Power, Product, Sum, Sym, negated

MAX_DEPTH = 24
"""Brackets, roots and exponents inside each other."""
MAX_PERIOD = 40
"""Digits under the line of a repeating decimal."""
MAX_SCALE = 64
"""Largest decimal exponent in ``1.5e3``."""


class Unreadable(ValueError):
    """The text is outside the grammar or its limits; it can still be compared letter by letter."""


FUNCTIONS = frozenset({"sin", "cos", "tan"})
VARIABLES = {
    "\\alpha", "\\beta", "\\gamma", "\\delta", "\\epsilon", "\\varepsilon", "\\zeta", "\\eta", "\\theta", "\\kappa",
    "\\lambda", "\\mu", "\\nu", "\\xi", "\\rho", "\\sigma", "\\tau", "\\phi", "\\varphi", "\\chi", "\\psi", "\\omega",
    "\\ell", "\\infty",
}  # fmt: skip


def parse_expression(tokens: Sequence[str]) -> Expr:
    """Read an expression to its last token.

    Raises:
        Unreadable: it is outside the grammar or its limits.
    """
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.position < len(parser.tokens):
        parser.refuse()
    return value


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
            terms.append(term if sign == "+" else negated(term))
        value = terms[0] if len(terms) == 1 else Sum(tuple(terms))
        return Product((value,), (self.nested(self.sum),)) if self.accept("\\over") else value

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
        return token in ("(", "[", "{", "\\frac", "\\sqrt", "\\pi") or (
            bool(token) and (token in VARIABLES or token[0].isalpha() or (token[1:] in FUNCTIONS and token[0] == "\\"))
        )

    def power(self) -> Expr:
        value = self.signed()
        while (mark := self.peek()) in ("\\deg", "%"):
            while self.accept(mark):
                pass
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
        return negated(value) if negative else value

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
        if token[0] in "0123456789" or (token[0] == "." and len(token) > 1):
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
        if name in FUNCTIONS:
            return Call(name, self.nested(self.angle))
        if token in VARIABLES or (token[0].isalpha() and len(token) == 1):
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
        while self.may_multiply(token := self.peek()) and token.removeprefix("\\") not in FUNCTIONS:
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
        if (token.isalpha() and len(token) == 1) or token == "(" or token[:1] == "\\":
            return self.nested(self.atom)
        self.refuse()

    def mixed(self, token: str) -> Expr:
        """A number, or a whole number and a proper fraction behind it."""
        whole = _number(token)
        if "." in token and self.peek() in ("\\overline", "\\bar", "\\dot"):
            return Num(whole + self.period(token))
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

    def period(self, token: str) -> Fraction:
        """What the repeating digits behind a decimal add to it."""
        self.position += 1
        group = self.accept("{")
        digits = self.peek()
        if not digits.isdigit() or len(digits) > (MAX_PERIOD if group else 1) or "e" in token.lower():
            self.refuse()
        self.position += 1
        if group and not self.accept("}"):
            self.refuse()
        return Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(token.partition(".")[2]))


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
