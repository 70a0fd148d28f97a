"""Random answers and responses: sensible LaTeX, LaTeX gone wrong, and text made to be hard."""

from __future__ import annotations

from random import Random

TOKENS = [
    "\\frac", "\\dfrac", "\\sqrt", "\\pi", "\\circ", "\\text", "\\mathrm", "\\left", "\\right", "\\cdot", "\\times",
    "\\pm", "\\boxed", "\\sin", "\\angle", "\\infty", "\\alpha", "\\%", "\\$", "\\,", "\\!", "\\{", "\\}", "\\\\",
    "{", "}", "(", ")", "[", "]", "^", "_", "+", "-", "*", "/", "=", "<", ">", ",", ";", ":", ".", "|", "!", "'",
    "\"", "$", "%", "&", "#", "~", "0", "1", "2", "7", "10", "99", "3.5", ".5", "1e9", "1e400", "9" * 30, "x", "y",
    "AB", "cm", "m", "degrees", "units", "million", "or", "and", "sqrt", "pi", "cm^2", "km/h", "度", "厘米", "π", "√",
    "²", "°", "½", "−", "×", "４", "\u202e", "\x00", "\n", "\t", " ", "  ", "\ud800", "📐", "́", "{,}", "^{\\circ}",
    "_{1}", "**", "inf", "nan", "\\approx", "\\in", "\\over", "\\overline", "\\overarc", "\\textcolor{red}",
    "\\mathbf{", "\\text{", "\\text{ not}", "\\underline", "\\large", "\\checkmark", "\\degree", "C.", "(C)", "option",
    "N", "是", "等于", "不", "选项", "\u2010",
]  # fmt: skip
RESPONSE_TOKENS = [
    "<think>", "</think>", "\\boxed{", "\\boxed{48}", "{", "}", "\\{", "\\}", "\\", "48", "Answer: ", "#### ", "\n",
    " ", "\\boxed ", "$", "text ",
]  # fmt: skip
NAMES = [
    "", "", "x = ", "\\angle A = ", "\\approx ", "m\\angle 1 = ", "|AB| = ", "\\sin A = ", "DE+EF = ", "2x = ",
    "24+24 = ", "\\frac{AB}{CD} = ", "m\\overarc{AB} = ", "x \\in ", "C. ", "(C) ", "面积是", "\\mathbf{x} = ",
]  # fmt: skip
STYLES = ["\\mathbf", "\\text", "\\mathrm", "\\textcolor{red}", "\\underline", "\\large", "\\boldsymbol", "\\textbf"]
UNITS = [
    "",
    "",
    "",
    " cm",
    "\\text{ cm}^2",
    "^\\circ",
    " degrees",
    "\\%",
    "\\text{ km/h}",
    " units",
    "厘米",
    "\\text{ N}",
    "\\text{ cm (approximately)}",
    "\\text{ is wrong}",
    "^\\circ\\text{ degrees}",
    "\\degree C",
    "\\checkmark",
    " \\approx 8.66",
]


def expression(random: Random, depth: int = 3) -> str:
    """A formula that mostly makes sense."""
    if depth == 0 or random.random() < 0.2:
        return random.choice(
            [str(random.randint(0, 999)), f"{random.uniform(0, 99):.2f}", "\\pi", "x", "y", str(random.randint(2, 9))]
        )
    one = expression(random, depth - 1)
    two = expression(random, depth - 1)
    return random.choice(
        [
            f"{one}+{two}", f"{one}-{two}", f"{one}\\cdot {two}", f"{one}*{two}", f"\\frac{{{one}}}{{{two}}}",
            f"({one})/({two})", f"\\sqrt{{{one}}}", f"\\sqrt[3]{{{one}}}", f"({one})^2", f"({one})^{{{two}}}",
            f"({one})({two})", f"-{one}", f"\\sin {one}", f"\\cos({one})", f"2^{{-{one}}}", f"{one}\\frac{{1}}{{2}}",
        ]
    )  # fmt: skip


def answer(random: Random) -> str:
    """What may stand in a box."""
    kind = random.randrange(9)
    if kind < 2:
        return random.choice(NAMES) + expression(random) + random.choice(UNITS)
    if kind == 2:
        return ", ".join(expression(random, 2) for _ in range(random.randint(1, 25)))
    if kind == 3:
        return random.choice(["", "A = ", "(x,y) = "]) + f"({expression(random, 2)}, {expression(random, 2)})"
    if kind == 4:
        return "".join(random.choice(TOKENS) for _ in range(random.randint(0, 40)))
    if kind == 5:
        return hard(random)
    if kind == 6:
        return _mutated(random, expression(random) + random.choice(UNITS))
    if kind == 7:
        return _dressed(random, expression(random, 2) + random.choice(UNITS))
    return "".join(chr(random.choice((random.randrange(32, 127), random.randrange(0x250)))) for _ in range(30))


def _dressed(random: Random, text: str) -> str:
    """In styles, colours and brackets, or as a chain, a ratio or a fraction in plain TeX."""
    for _ in range(random.choice((1, 1, 2, 3, 60))):
        text = random.choice([f"{random.choice(STYLES)}{{{text}}}", text, f"x = {text}"])
    other = expression(random, 1)
    return random.choice(
        [
            text, f"{other} = {text}", f"{text} \\approx 3.1", f"{{{text} \\over {other}}}", f"{text}:{other}:3",
            f"0.\\overline{{{other}}}{text}", f"\\{{{text}, {other}\\}}", f"x \\in \\{{{text}, {other}\\}}",
        ]
    )  # fmt: skip


def hard(random: Random) -> str:
    """One thing many times, one inside the other, or to a large power."""
    size = random.choice((5, 20, 60, 130, 400, 5000))
    inner = random.choice(["2", "x", "7.5", "(x+y)", "\\sqrt{2}", "(1+\\sqrt{2}+\\sqrt{3})", "\\pi", ""])
    opening, closing = random.choice(
        [
            ("(", ")"),
            ("{", "}"),
            ("\\sqrt{", "}"),
            ("\\frac{1}{", "}"),
            ("2^{", "}"),
            ("sqrt(", ")"),
            ("\\sin(", ")"),
            ("\\mathbf{", "}"),
            ("\\text{ ", "}"),
            ("{1 \\over ", "}"),
            ("x = {", "}"),
            ("\\{", "\\}"),
        ]
    )
    piece = random.choice(TOKENS) + random.choice(["", inner, random.choice(TOKENS)])
    power = random.choice([2, 9, 16, 63, 64, 65, 9999, 10**12])
    sign = random.choice(["+", "*", "/", "-", ",", "^", "**", " ", "=", "\\pm ", ":", "\\approx ", "\\over "])
    return random.choice(
        [
            opening * size + inner + closing * size,
            piece * size,
            sign.join([f"{inner}^{{{power}}}"] * min(size, 60)),
            sign.join([inner] * min(size, 200)),
            f"({inner}+{random.randint(1, 99)})^{{{power}}}{sign}({inner}+y)^{power}",
            f"\\frac{{{random.randint(2, 9)}^{{{power}}}}}{{{random.randint(2, 9)}^{{{power}}}}}"
            * random.randint(1, 8),
            str(random.getrandbits(random.choice((64, 500, 1200, 9000)))),
            f"\\sqrt{{{random.getrandbits(random.choice((40, 64, 200, 900)))}}}",
        ]
    )


def _mutated(random: Random, text: str) -> str:
    characters = list(text)
    for _ in range(random.randint(1, 4)):
        position = random.randrange(len(characters) + 1)
        characters[position : position + random.randint(0, 2)] = random.choice(TOKENS)
    return "".join(characters)


def response(random: Random) -> str:
    """Mostly a box with an answer; sometimes tags and braces in any order, short or long."""
    kind = random.randrange(10)
    if kind < 8:
        end = random.choice(["", ".", "}", "\\boxed{", "<|im_end|>"])
        start = random.choice(["<think>a</think>", "", "<think>", "Answer: "])
        return f"{start}\\boxed{{{answer(random)}}}{end}"
    tokens = [random.choice(RESPONSE_TOKENS) for _ in range(random.randint(0, 30))]
    return "".join(tokens) * random.choice((1, 1, 1, 1, 40))
