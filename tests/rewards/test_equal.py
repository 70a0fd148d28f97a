"""When two answers are the same: verdicts worked out by hand."""

from __future__ import annotations

import pytest

from dapo.rewards.equal import equivalent

SAME = {
    "integers": ["48", " 48 ", "48.", "48.0", "048", "+48", "4.8e1", "{48}", "$48$", r"\(48\)", r"\text{48}",
        r"\mathbf{48}"],
    "integer expressions": ["48", "24 + 24", r"6 \times 8", r"6\cdot8", "96/2", r"\frac{96}{2}", "7^2-1", "2^{5}+16",
        "--48"],
    "digits of other scripts": ["48", "４８", "٤٨"],
    "digits with spaces, as LaTeX ignores them": ["48", "4 8"],
    "thousands": ["1200", "1,200", "1{,}200", r"1\,200", r"1,\!200", "1 200", "1.2e3", r"1.2 \times 10^{3}",
        r"\$1,200"],
    "millions": ["2 million", "2000000", "2,000,000", r"2 \times 10^6", r"2 \text{ million}"],
    "decimals": ["0.5", ".5", "0.50", "1/2", r"\frac{1}{2}", r"\frac12", "½", "2^{-1}", r"50\%", "5e-1"],
    "fractions": [r"\frac{18}{5}", r"\dfrac{18}{5}", r"\tfrac{18}{5}", r"\cfrac{18}{5}", r"\frac { 18 } { 5 }",
        "18/5", "36/10", "3.6", r"3\frac{3}{5}", "3 3/5", "3⅗", r"\frac{-18}{-5}", "(18)/(5)", r"18 \div 5",
        r"\frac{18}5", "18:5"],
    "nested fractions": [r"\frac{1}{\frac{1}{2}}", "2", r"\frac{\frac{4}{3}}{\frac{2}{3}}"],
    "negative": [r"-\frac{3}{4}", r"\frac{-3}{4}", r"\frac{3}{-4}", "-3/4", "- 0.75", "−3/4", "–.75"],
    "roots": [r"5\sqrt{3}", r"5 \sqrt { 3 }", r"5\sqrt3", "5*sqrt(3)", "5√3", r"\sqrt{75}", r"5\cdot 3^{\frac{1}{2}}",
        r"\frac{15}{\sqrt{3}}", r"\sqrt{3} 5", r"\sqrt{25 \cdot 3}", "5*3^(1/2)", r"5\surd3"],
    "rationalised": [r"\frac{5\sqrt{3}}{3}", r"\frac{5}{\sqrt{3}}", "5/sqrt(3)", r"\sqrt{\frac{25}{3}}",
        r"\frac{5}{3}\sqrt{3}"],
    "sums of roots": [r"3+\sqrt{2}", r"\sqrt{2}+3", r"\frac{7}{3-\sqrt{2}}", r"\frac{6+2\sqrt{2}}{2}",
        r"\sqrt{11+6\sqrt{2}}"],
    "perfect powers": ["4", r"\sqrt{16}", r"\sqrt[3]{64}", "2^2", "16^{1/2}", r"64^{\frac13}", "∛64"],
    "pi": [r"25\pi", r"25 \pi", "25pi", "25π", r"5^2 \pi", r"\pi \cdot 25", r"\frac{50\pi}{2}", r"25(\pi)",
        r"25\pi\text{ cm}^2"],
    "mixed number of pi": [r"\frac{9\pi}{4}", r"\frac{9}{4}\pi", r"2.25\pi", r"2\frac{1}{4}\pi", r"9\pi/4"],
    "degrees": ["65", r"65^\circ", r"65^{\circ}", "65°", "65 degrees", r"65\degree", r"65\text{°}", "65度",
        r"60^\circ+5^\circ"],
    "right angle in radians": [r"90^\circ", r"\frac{\pi}{2}"],
    "sines": [r"\frac{1}{2}", r"\sin 30^\circ", r"\sin(30°)", r"\cos{60^\circ}", r"\sin\frac{\pi}{6}"],
    "centimetres": ["12", "12 cm", "12cm", r"12 \text{ cm}", r"12\,\mathrm{cm}", "12厘米", "12 units"],
    "areas": ["12", "12 cm^2", "12 cm²", r"12 \text{ cm}^{2}", "12 square cm", r"12 \text{ sq. cm}", "12平方厘米",
        "12 square units"],
    "lengths in two units": ["1.2 m", "120 cm", r"1200\text{ mm}"],
    "speeds in two units": ["36 km/h", "10 m/s"],
    "counted things": ["12", r"12 \text{ apples}", "12 apples"],
    "per cent": [r"25\%", "25", "25%", "25 percent"],
    "per cent as a fraction": [r"25\%", "0.25", r"\frac{1}{4}"],
    "named": ["48", "x = 48", "x=48", "AB = 48", r"\angle ABC = 48^\circ", r"m\angle A=48", "f(x)=48", "x_1 = 48",
        "48 = x", "x = 24+24 = 48", r"\approx 48", r"x \approx 48", r"\text{Area} = 48", "答案是48", "约48"],
    "points": ["(3,4)", "(3, 4)", r"\left(3, 4\right)", r"(3.0, \frac{8}{2})", r"\langle 3, 4 \rangle"],
    "lists": ["2, 3", "3,2", "2 or 3", "2 and 3", r"\{2, 3\}", "x=2 or x=3", r"2 \text{ or } 3", "2或3", "2; 3"],
    "plus minus": [r"\pm 3", "±3", "3, -3", "-3 or 3", r"x = \pm 3"],
    "half-open intervals": ["[0,1)", r"\left[0, 1\right)"],
    "ratios": ["3:4", "6 : 8", "3/4", r"3\colon4"],
    "choices": ["B", "b", "(B)", "B.", "B)", r"\text{B}", r"\textbf{(B)}", "选B"],
    "words": ["yes", "Yes", r"\text{yes}", r"\text{ Yes }"],
    "polynomials": ["2x+3", "3+2x", "2*x + 3", "2(x+1.5)", "x+x+3", "y = 2x+3"],
    "products of polynomials": ["(x+1)(x-1)", "x^2-1", "x^{2} - 1", "x*x - 1"],
    "rational functions": [r"\frac{x^2-1}{x-1}", "x+1", r"\frac{2x+2}{2}"],
    "three variables": ["a+b+c", "c+b+a"],
    "equations of a line": ["2x+3y=7", "3y+2x=7", "7 = 2x+3y"],
    "greek letters": [r"2\alpha", r"\alpha + \alpha", "2α"],
}  # fmt: skip

DIFFERENT = [
    ("47", "48"), ("5", "-5"), ("110.58", "110.6"), ("0.333", r"\frac{1}{3}"), ("8.66", r"5\sqrt{3}"),
    ("78.54", r"25\pi"), ("48 50", "48"), (r"\sqrt{2}", "1.4142135623730951"), (r"\pi", r"\frac{22}{7}"),
    (r"\pi", "3.14159265358979323846"), ("12 m", "12 cm"), ("12 cm^2", "12 cm"), ("12 seconds", "12 cm"),
    ("12 apples", "12 cm"), ("25", "0.25"), (r"25\%", "2500"), ("(4,3)", "(3,4)"), ("3,4", "(3,4)"),
    ("[0,1)", "(0,1)"), ("[0,1]", "[0,1)"), ("2, 2", "2, 3"), ("2, 3, 4", "2, 3"), ("x=3, y=4", "x=4, y=3"),
    ("(1,200)", "1200"), ("33/5", "3 3/5"), ("3, 3/5", "18/5"), ("A", "B"), ("B or C", "B"), ("no", "on"),
    ("yes", "no"), ("not 48", "48"), ("2x+3", "2x+4"), ("x", "y"), ("2^x", "x^2"), ("2x+3y=7", "2x+3y=8"),
    ("2x+3y=7", "2x+3y"), ("2^3", "3^2"), (r"\sqrt{3}+\sqrt{2}", r"\sqrt{5}"), (r"\sqrt[3]{2}", r"\sqrt{2}"),
    (r"-\sqrt{2}", r"\sqrt{2}"), (r"\sin 30", r"\frac12"), ("4_8", "48"), ("48%comment", "48"), ("48!", "48"),
    ("\u202e84", "48"), ("48\ufffd", "48"), (r"60\pi^\circ", "60"), (r"\frac{1}{0}", r"\frac{2}{0}"), ("0^0", "1"),
    (r"\sqrt{-4}", "-2"), (r"\sqrt{-4}", "2"), ("9^9^9", "9^9^9^1"), ("1e999", "inf"), ("nan", "48"),
    ("48 + 10^{-50}", "48"), (r"\sqrt{2} + 10^{-60}", r"\sqrt{2}"), (r"\frac{10^{40}+1}{10^{40}}", "1"),
    ("None", "48"), ("12,00", "1200"), ("1,2000", "12000"), ("3.6.0", "3.6"), (r"\boxed{", "48"), (r"\input{x}", "x"),
    (r"2\frac{1}{3}", "2/3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "truth"), [(a, group[0]) for group in SAME.values() for a in group], ids=lambda text: ascii(text)
)
def test_same_answers_in_other_words_are_equal(given: str, truth: str) -> None:
    assert equivalent(given, truth)
    assert equivalent(truth, given)


@pytest.mark.parametrize(("given", "truth"), DIFFERENT, ids=lambda text: ascii(text))
def test_different_answers_are_not_equal(given: str, truth: str) -> None:
    assert not equivalent(given, truth)
    assert not equivalent(truth, given)


@pytest.mark.parametrize("given", ["", " ", "48", "\\text{}"])
def test_an_empty_ground_truth_is_never_met(given: str) -> None:
    assert not equivalent(given, "")
    assert not equivalent("", given)


def test_a_boxed_ground_truth_is_unpacked() -> None:
    assert equivalent("48", "\\boxed{48}")


def test_answers_outside_the_grammar_are_compared_letter_by_letter() -> None:
    assert equivalent("x \\le 3", "x <= 3")
    assert equivalent("\\triangle ABC", "△ABC")
    assert not equivalent("\\triangle ABC", "\\triangle ABD")


def test_an_overlong_answer_equals_itself_only() -> None:
    long = "1+" * 300 + "1"
    assert equivalent(long, long)
    assert not equivalent(long, "301")


def test_lists_are_matched_whatever_their_order_and_size() -> None:
    one = ", ".join(f"\\sqrt{{{n}}}" for n in range(2, 20))
    two = ", ".join(f"{n}^{{0.5}}" for n in reversed(range(2, 20)))
    assert equivalent(one, two)
    assert not equivalent(one, two.replace("19", "21"))
