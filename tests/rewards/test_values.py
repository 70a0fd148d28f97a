"""Laws of exact and numeric values, against Python's own numbers."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dapo.rewards import exact, numeric
from dapo.rewards.equal import equivalent
from dapo.rewards.expression import MAX_DEPTH, Unreadable, parse_expression
from dapo.rewards.latex import tokens
from dapo.rewards.tree import Call, Expr, Num, Power, Product, Sum, Sym

INTEGERS = st.integers(-999, 999)
RATIONALS = st.fractions(-99, 99, max_denominator=99)


def read(text: str) -> Expr:
    found = tokens(text)
    assert found is not None
    return parse_expression(found)


@given(RATIONALS, RATIONALS)
def test_fractions_are_equal_exactly_if_their_numbers_are(a: Fraction, b: Fraction) -> None:
    one, two = f"\\frac{{{a.numerator}}}{{{a.denominator}}}", f"{b.numerator}/{b.denominator}"
    assert equivalent(one, two) is (a == b)


@given(INTEGERS, st.integers(0, 10**6))
def test_a_decimal_equals_its_fraction_and_not_its_neighbour(whole: int, part: int) -> None:
    decimal = f"{whole}.{part:06d}"
    exactly = Fraction(decimal)
    assert equivalent(decimal, f"{exactly.numerator}/{exactly.denominator}")
    assert not equivalent(decimal, f"{exactly.numerator * 10**9 + exactly.denominator}/{exactly.denominator * 10**9}")


@given(st.integers(1, 60), st.integers(1, 400), st.integers(1, 60), st.integers(1, 400))
def test_multiples_of_square_roots_compare_like_their_squares(a: int, b: int, c: int, d: int) -> None:
    assert equivalent(f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{d}}}*{c}") is (a * a * b == c * c * d)


@given(st.integers(2, 5), st.integers(1, 40), st.integers(1, 40))
def test_roots_of_products_are_products_of_roots(degree: int, a: int, b: int) -> None:
    assert equivalent(f"\\sqrt[{degree}]{{{a}}}\\sqrt[{degree}]{{{b}}}", f"({a * b})^{{1/{degree}}}")


@given(st.integers(1, 30), st.integers(1, 30))
def test_a_denominator_with_a_root_can_be_rationalised(a: int, b: int) -> None:
    assume(a * a != b)
    assert equivalent(f"\\frac{{1}}{{{a}+\\sqrt{{{b}}}}}", f"\\frac{{{a}-\\sqrt{{{b}}}}}{{{a * a - b}}}")


@given(st.integers(1, 30), st.integers(1, 30))
def test_nested_roots_are_compared_numerically(a: int, b: int) -> None:
    square = f"\\sqrt{{{a + b}+2\\sqrt{{{a * b}}}}}"
    assert equivalent(square, f"\\sqrt{{{a}}}+\\sqrt{{{b}}}")
    assert not equivalent(square, f"\\sqrt{{{a}}}+\\sqrt{{{b + 1}}}")


@given(st.lists(INTEGERS, min_size=1, max_size=5), st.integers(-20, 20))
def test_a_polynomial_equals_its_factored_form(roots: list[int], leading: int) -> None:
    coefficients = [leading]
    for root in roots:
        coefficients = [a - root * b for a, b in zip([*coefficients, 0], [0, *coefficients], strict=True)]
    expanded = "+".join(f"({c})x^{{{len(roots) - i}}}" for i, c in enumerate(coefficients))
    factored = f"({leading})" + "".join(f"(x-({root}))" for root in roots)
    assert equivalent(factored, expanded)
    assert not equivalent(factored, f"{expanded}+1")


ATOMS = st.one_of(
    st.integers(1, 30).map(lambda n: Num(Fraction(n))),
    st.fractions(Fraction(1, 9), 9, max_denominator=9).map(Num),
    st.sampled_from([Sym("pi"), Sym("x"), Sym("y")]),
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda terms: Sum(tuple(terms))),
        st.tuples(inner, inner).map(lambda pair: Product((pair[0],), (pair[1],))),
        st.lists(inner, min_size=2, max_size=3).map(lambda factors: Product(tuple(factors), ())),
        st.tuples(inner, st.sampled_from([Fraction(2), Fraction(1, 2), Fraction(-1), Fraction(2, 3)])).map(
            lambda pair: Power(pair[0], Num(pair[1]))
        ),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_exact_and_numeric_values_agree(expression: Expr) -> None:
    """All parts are positive, so every expression has a value."""
    try:
        numerator, denominator = exact.Evaluation({}).value(expression)
        close = numeric.value(expression, {"pi": numeric.PI})
    except (exact.Inexact, exact.Undefined):
        assume(False)
    value = _float(numerator) / _float(denominator)
    assert math.isclose(value, float(close), rel_tol=1e-9)


def _float(polynomial: exact.Polynomial) -> float:
    at = {"pi": math.pi, "x": float(numeric.variable("x")), "y": float(numeric.variable("y"))}
    return sum(
        float(c) * math.prod((at[a] if isinstance(a, str) else a) ** float(e) for a, e in monomial)
        for monomial, c in polynomial.items()
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\\sin 30^\\circ", 0.5),
        ("\\tan 45^\\circ", 1.0),
        ("\\cos 1", math.cos(1)),
        ("\\sin 12345.678", math.sin(12345.678)),
    ],
)
def test_functions_take_radians_and_degrees(text: str, value: float) -> None:
    result = numeric.value(read(text), {"pi": numeric.PI, "deg": numeric.DEGREE})
    assert float(result) == pytest.approx(value, rel=1e-12)


def test_numeric_values_are_right_to_the_tolerance() -> None:
    with numeric.precision():
        root = numeric.value(read("2^{\\sqrt{2}}"), {})
        third = numeric.value(Power(Num(Fraction(5)), Num(Fraction(1, 3))), {})
        assert abs(root - Decimal("2.6651441426902251886502972498731398482742113137146594928359795934")) < Decimal(
            "1e-60"
        )
        assert abs(third**3 - 5) < Decimal("1e-90")


@pytest.mark.parametrize(
    "text",
    [
        "\\frac{1}{0}",
        "0^0",
        "0^{-1}",
        "\\sqrt{-1}",
        "9^{9^{9}}",
        "2^{65}",
        "(2^{60})^{60}",
        "\\tan 90^\\circ",
        "\\sin 10^{9}",
    ],
)
def test_what_has_no_value_or_too_large_a_one_is_undefined(text: str) -> None:
    constants = {"pi": numeric.PI, "deg": numeric.DEGREE}
    with pytest.raises((exact.Undefined, exact.Inexact)):
        exact.Evaluation({}).value(read(text))
    with pytest.raises(exact.Undefined):
        numeric.value(read(text), constants)


def test_depth_is_limited() -> None:
    read("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH)
    with pytest.raises(Unreadable, match="levels deep"):
        read("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1))


def test_a_hard_radicand_is_left_to_numbers() -> None:
    semiprime = 1_000_000_007 * 998_244_353
    with pytest.raises(exact.Inexact):
        exact.prime_factors(semiprime)
    assert equivalent(f"\\sqrt{{{semiprime}}}", "\\sqrt{1000000007}\\sqrt{998244353}")
    assert not equivalent(f"\\sqrt{{{semiprime}}}", f"\\sqrt{{{semiprime + 1}}}")


def test_a_function_has_no_exact_form() -> None:
    with pytest.raises(exact.Inexact):
        exact.Evaluation({}).value(Call("sin", Num(Fraction(1))))
