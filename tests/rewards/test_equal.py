"""When two answers are the same: verdicts worked out by hand."""

from __future__ import annotations

import pytest

from dapo.rewards.equal import equivalent

SAME = {
    "integers": ["48", " 48 ", "48.", "48.0", "048", "+48", "4.8e1", "{48}", "$48$", r"\(48\)", r"\text{48}",
        r"\mathbf{48}",
        r"\large 48", r"{\bf 48}", r"\textcolor{red}{48}", r"\color{red}48", r"\underline{48}", r"48\checkmark", "48✓",
        r"\mathbf{\text{48}}", r"\thickapprox 48"],
    "integer expressions": ["48", "24 + 24", r"6 \times 8", r"6\cdot8", "96/2", r"\frac{96}{2}", "7^2-1", "2^{5}+16",
        "--48",
        "24+24 = 48", r"\frac12\cdot 12\cdot 8 = 48", "6*8 = 24+24 = 48", "48 = 6*8"],
    "digits of other scripts": ["48", "４８", "٤٨"],
    "digits with spaces, as LaTeX ignores them": ["48", "4 8"],
    "thousands": ["1200", "1,200", "1{,}200", r"1\,200", r"1,\!200", "1 200", "1.2e3", r"1.2 \times 10^{3}",
        r"\$1,200"],
    "millions": ["2 million", "2000000", "2,000,000", r"2 \times 10^6", r"2 \text{ million}"],
    "decimals": ["0.5", ".5", "0.50", "1/2", r"\frac{1}{2}", r"\frac12", "½", "2^{-1}", r"50\%", "5e-1",
        r"{1\over2}", r"1 \over 2", r"0.4\overline{9}"],
    "fractions": [r"\frac{18}{5}", r"\dfrac{18}{5}", r"\tfrac{18}{5}", r"\cfrac{18}{5}", r"\frac { 18 } { 5 }",
        "18/5", "36/10", "3.6", r"3\frac{3}{5}", "3 3/5", "3⅗", r"\frac{-18}{-5}", "(18)/(5)", r"18 \div 5",
        r"\frac{18}5", "18:5"],
    "nested fractions": [r"\frac{1}{\frac{1}{2}}", "2", r"\frac{\frac{4}{3}}{\frac{2}{3}}"],
    "negative": [r"-\frac{3}{4}", r"\frac{-3}{4}", r"\frac{3}{-4}", "-3/4", "- 0.75", "−3/4", "–.75",
        "‐3/4", "‑3/4", r"\mathbf{-\frac{3}{4}}"],
    "roots": [r"5\sqrt{3}", r"5 \sqrt { 3 }", r"5\sqrt3", "5*sqrt(3)", "5√3", r"\sqrt{75}", r"5\cdot 3^{\frac{1}{2}}",
        r"\frac{15}{\sqrt{3}}", r"\sqrt{3} 5", r"\sqrt{25 \cdot 3}", "5*3^(1/2)", r"5\surd3",
        r"\mathbf{5\sqrt{3}}", r"\text{5\sqrt3}", r"\boldsymbol{5}\mathbf{\sqrt{3}}", r"5\sqrt3 \approx 8.66",
        r"x = 5\sqrt3 \approx 8.66", r"\sqrt{75} = 5\sqrt{3} \approx 8.7\text{ cm}", r"5\sqrt3 ≈ 8.660"],
    "rationalised": [r"\frac{5\sqrt{3}}{3}", r"\frac{5}{\sqrt{3}}", "5/sqrt(3)", r"\sqrt{\frac{25}{3}}",
        r"\frac{5}{3}\sqrt{3}"],
    "sums of roots": [r"3+\sqrt{2}", r"\sqrt{2}+3", r"\frac{7}{3-\sqrt{2}}", r"\frac{6+2\sqrt{2}}{2}",
        r"\sqrt{11+6\sqrt{2}}"],
    "perfect powers": ["4", r"\sqrt{16}", r"\sqrt[3]{64}", "2^2", "16^{1/2}", r"64^{\frac13}", "∛64"],
    "pi": [r"25\pi", r"25 \pi", "25pi", "25π", r"5^2 \pi", r"\pi \cdot 25", r"\frac{50\pi}{2}", r"25(\pi)",
        r"25\pi\text{ cm}^2",
        r"25\pi \approx 78.54"],
    "mixed number of pi": [r"\frac{9\pi}{4}", r"\frac{9}{4}\pi", r"2.25\pi", r"2\frac{1}{4}\pi", r"9\pi/4"],
    "degrees": ["65", r"65^\circ", r"65^{\circ}", "65°", "65 degrees", r"65\degree", r"65\text{°}", "65度",
        r"60^\circ+5^\circ",
        "65 Degrees", r"\mathbf{65^\circ}", r"65^\circ\text{ degrees}", r"65^\circ \text{ (approximately)}"],
    "right angle in radians": [r"90^\circ", r"\frac{\pi}{2}"],
    "sines": [r"\frac{1}{2}", r"\sin 30^\circ", r"\sin(30°)", r"\cos{60^\circ}", r"\sin\frac{\pi}{6}"],
    "centimetres": ["12", "12 cm", "12cm", r"12 \text{ cm}", r"12\,\mathrm{cm}", "12厘米", "12 units",
        r"\mathrm{12\,cm}", r"\mathbf{12\text{ cm}}", r"12 \text{ cm (approximately)}", r"12\text{ approx. cm}",
        r"12\text{ (units)}", "x = {12 cm}"],
    "areas": ["12", "12 cm^2", "12 cm²", r"12 \text{ cm}^{2}", "12 square cm", r"12 \text{ sq. cm}", "12平方厘米",
        "12 square units"],
    "lengths in two units": ["1.2 m", "120 cm", r"1200\text{ mm}"],
    "speeds in two units": ["36 km/h", "10 m/s"],
    "counted things": ["12", r"12 \text{ apples}", "12 apples"],
    "per cent": [r"25\%", "25", "25%", "25 percent"],
    "per cent as a fraction": [r"25\%", "0.25", r"\frac{1}{4}"],
    "named": ["48", "x = 48", "x=48", "AB = 48", r"\angle ABC = 48^\circ", r"m\angle A=48", "f(x)=48", "x_1 = 48",
        "48 = x", "x = 24+24 = 48", r"\approx 48", r"x \approx 48", r"\text{Area} = 48", "答案是48", "约48",
        r"\sin A = 48", r"|AB| = 48", r"\left|AB\right| = 48", r"m\overarc{AB} = 48^\circ", r"m\angle 1 = 48",
        r"\angle{12} = 48", r"m\overset{\frown}{AB} = 48^\circ", r"\boldsymbol{x} = 48", "AB = CD = 48",
        "x等于48", "面积是48", "面积约为48", r"\arctan(3) = 48", r"\text{Area} \thickapprox 48"],
    "points": ["(3,4)", "(3, 4)", r"\left(3, 4\right)", r"(3.0, \frac{8}{2})", r"\langle 3, 4 \rangle",
        "A = (3,4)", r"M=\left(3,4\right)", "(x,y)=(3,4)", "(x_1, y_1) = (3, 4)", "P = (1+2, 4)"],
    "lists": ["2, 3", "3,2", "2 or 3", "2 and 3", r"\{2, 3\}", "x=2 or x=3", r"2 \text{ or } 3", "2或3", "2; 3",
        r"x = \{2,3\}", r"x \in \{2,3\}", "x ∈ {2,3}", r"\mathbf{\{2, 3\}}"],
    "plus minus": [r"\pm 3", "±3", "3, -3", "-3 or 3", r"x = \pm 3"],
    "half-open intervals": ["[0,1)", r"\left[0, 1\right)",
        r"x \in [0,1)"],
    "periods": [r"\frac13", r"0.\overline{3}", r"0.\bar{3}", r"0.3\dot{3}", r"\frac13 \approx 0.333"],
    "proportions": ["1:2:3", "2:4:6", r"\frac12 : 1 : 1.5", "-1:-2:-3"],
    "points with names": ["A=(1,2), B=(3,4)", "B=(3,4), A=(1,2)"],
    "newtons": ["48", r"48\text{ N}", r"48\,\mathrm{N}"],
    "temperatures": ["48", r"48\degree C", r"48^\circ C", r"48^\circ\text{C}", "48℃", "48°C"],
    "ratios": ["3:4", "6 : 8", "3/4", r"3\colon4"],
    "choices": ["B", "b", "(B)", "B.", "B)", r"\text{B}", r"\textbf{(B)}", "选B",
        "option B", "Option (B)", r"\text{option B}", "Answer: B", "选择B", "B选项", "选项B", "故选B",
        "B. 48", "(B) 48", r"\textbf{(B)}\ 48", r"\text{B) 48 cm}"],
    "words": ["yes", "Yes", r"\text{yes}", r"\text{ Yes }"],
    "polynomials": ["2x+3", "3+2x", "2*x + 3", "2(x+1.5)", "x+x+3", "y = 2x+3"],
    "products of polynomials": ["(x+1)(x-1)", "x^2-1", "x^{2} - 1", "x*x - 1"],
    "rational functions": [r"\frac{x^2-1}{x-1}", "x+1", r"\frac{2x+2}{2}"],
    "three variables": ["a+b+c", "c+b+a"],
    "equations of a line": ["2x+3y=7", "3y+2x=7", "7 = 2x+3y"],
    "greek letters": [r"2\alpha", r"\alpha + \alpha", "2α"],
}  # fmt: skip

MEETS = [
    ("DE+EF = 10", "10"), (r"\frac{AB}{CD}=2", "2"), (r"\angle 1 + \angle 2 = 90^\circ", "90"), ("x+y = 10", "10"),
    ("f(2) = 3", "3"),
    (r"\frac12 bh = 24", "24"), (r"AB+CD \approx 8.7", "8.7"), (r"5\sqrt3 \approx 8.66", "8.66"), ("24+24 = 47", "47"),
    (r"\frac23 \approx 0.67", "0.67"), (r"-\frac23 \approx -0.67 \text{ cm}", "-0.67 cm"), ("C. 48", "48"),
    (r"(C) 48\text{ cm}", "48"), (r"(C) \frac12", r"\frac12"), (r"5\sqrt3 \approx 8.67", r"5\sqrt3"),
    (r"\arctan(0.75) \approx 36.87^\circ", "36.87"), ("AB:CD = 2:3", r"\frac23"), ("(x+1)(x-1) = x^2-1", "x^2-1"),
]  # fmt: skip
"""Answers that say more than the ground truth; the other way round they may not be met."""

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
    (r"2\frac{1}{3}", "2/3"), ("24+24 = 47", "48"), (r"5\sqrt3 = 8.66", r"5\sqrt3"), (r"5\sqrt3 \approx 8.67", "8.67"),
    (r"47 \approx 48", "48"), (r"\frac23 \approx -0.67", "-0.67"), (r"x \approx 8.7", "8.66"), ("2x = 48", "48"),
    ("2x = 48", "24"), ("x+1 = 48", "48"), ("x(2) = 48", "48"),
    (r"48 = 2x", "48"), (r"2\sin A = 1", "1"), ("2AB = 48", "48"),
    ("AB^2 = 25", "25"), (r"\angle 1 + 10 = 48", "48"), ("|x| = 48", "48"), ("√x = 4", "4"), (r"x \not= 48", "48"),
    (r"\not= 48", "48"), ("x != 48", "48"), (r"\not\approx 48", "48"), (r"47\not\approx 48", "48"),
    ("not x = 48", "48"),
    (r"\text{not } x = 48", "48"), (r"\text{half the area} = 48", "48"), ("x不等于48", "48"), ("面积不是48", "48"),
    ("错误答案是48", "48"), ("48是错的", "48"), ("面积的一半是48", "48"), ("= =", "="), ("() = 48", "48"),
    (r"48\text{not}", "48"), (r"48 \text{ is wrong}", "48"), (r"48\text{ cm (not)}", "48"), (r"48 \text{ dozen}", "48"),
    (r"48\text{ N}", r"48\text{ J}"), ("48N", "48"), (r"48\text{x}", "48"), (r"\cancel{48}", "48"),
    (r"\textcolor{red}{47}", "48"), (r"\mathbf{5\sqrt{3}", r"5\sqrt3"), (r"\mathbf{x+1}^2", "(x+1)^2"),
    ("(3,4) = A", "(4,3)"), ("A = (3,4)", "(4,3)"), ("(y,x) = (3,4)", "(3,4)"), (r"x = \{2,3\}", r"\{2,4\}"),
    ("A=(1,2), B=(3,4)", "A=(3,4), B=(1,2)"), (r"x \in \{3,4\}", "(3,4)"), (r"x \notin \{2,3\}", r"\{2,3\}"),
    ("C. 47", "48"), ("C. 48", "D. 48"), ("C. 48", "C. 47"), ("C. 48", "B"), ("(C) + 5", "5"), ("C/48", "48"),
    ("option B", "C"), ("B. 3, C. 4", "B"),
    ("B. 3, C. 4", "3, 4"), ("(A) (B)", "A"), ("不选B", "B"), (r"0.\overline{3}", "0.3"), (r"0.\overline{3}", "0.33"),
    (r"3\overline{5}", "35"), ("1:2:3", "2:4:7"), ("1:2:3", "3:2:1"), ("0:1:2", "0:2:5"), ("0:0:0", "1:2:3"),
    (r"65\%", r"65^\circ"), ("48 cm", r"48^\circ"), (r"48\text{ apples}", r"48^\circ"), (r"0.25\text{ m}", r"25\%"),
    (r"48^\circ C", r"48^\circ F"), (r"{1\over2}", "2"), (r"{1 \over 2 \over 3}", "1/6"), ("48 OR", "48"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "truth"), [(a, group[0]) for group in SAME.values() for a in group], ids=lambda text: ascii(text)
)
def test_same_answers_in_other_words_are_equal(given: str, truth: str) -> None:
    assert equivalent(given, truth)
    assert equivalent(truth, given)


@pytest.mark.parametrize(("given", "truth"), MEETS, ids=lambda text: ascii(text))
def test_an_answer_may_say_more_than_was_asked(given: str, truth: str) -> None:
    assert equivalent(given, truth)


@pytest.mark.parametrize("given", ["7", "2x+3y", "y = 7"])
def test_only_an_equation_meets_an_equation(given: str) -> None:
    assert not equivalent(given, "2x+3y=7")


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
