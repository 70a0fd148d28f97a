"""From what a model put in the box to tokens: one spelling for each thing, nothing interpreted yet.

Tokens are plain strings, distinguished by their first character: a digit or a dot begins a number, a letter a word, a
backslash a command, `TEXT` a quoted piece of prose; everything else is an operator of one or two characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

MAX_CHARS = 400
"""Longer answers are not read. The longest ground truth of Geometry3K has fewer than 60 characters."""

TEXT = "\x02"
"""Opens a token that was prose (``\\text{...}``); cannot come from the model: control characters are refused."""

OPENING = {"(": ")", "[": "]", "\\{": "\\}", "{": "}"}
"""Brackets and what closes them."""
MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_SYMBOLS = {
    "−": "-", "‐": "-", "‑": "-", "‒": "-", "–": "-", "—": "-", "―": "-", "﹣": "-", "×": "*", "⋅": "*", "·": "*",
    "∙": "*", "÷": "/", "∕": "/", "⁄": "/", "∶": ":", "√": " sqrt ", "∛": " cbrt ", "π": " pi ", "𝜋": " pi ",
    "°": " degrees ", "º": " degrees ", "˚": " degrees ", "℃": " degrees C", "℉": " degrees F", "∠": "\\angle ",
    "△": "\\triangle ", "±": "\\pm ", "≈": "\\approx ", "∈": "\\in ", "✓": " ", "✔": " ", "✅": " ",
    "≤": "<=", "≥": ">=", "≠": "!=", "∞": "\\infty ", "、": ",", "。": ".", "′": "'",
    "⁰": "^0", "¹": "^1", "²": "^2", "³": "^3", "⁴": "^4", "⁵": "^5", "⁶": "^6", "⁷": "^7", "⁸": "^8", "⁹": "^9",
    "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅖": " 2/5", "⅗": " 3/5",
    "⅘": " 4/5", "⅙": " 1/6", "⅚": " 5/6", "⅛": " 1/8", "⅜": " 3/8", "⅝": " 5/8", "⅞": " 7/8",
    "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "θ": "\\theta ", "φ": "\\phi ", "λ": "\\lambda ",
    "㎝": " cm", "㎜": " mm", "㎞": " km", "㎡": " m^2", "㎠": " cm^2", "\u00a0": "\\ ", "\u3000": " ", "\u2009": " ",
    "\u202f": " ", "\u2002": " ", "\u2003": " ",
}  # fmt: skip
_TRANSLATION = _FULL_WIDTH | {ord(sign): spelling for sign, spelling in _SYMBOLS.items()}

_CHINESE = {
    "平方厘米": " cm^2", "平方毫米": " mm^2", "平方分米": " dm^2", "平方千米": " km^2", "平方米": " m^2",
    "立方厘米": " cm^3", "立方毫米": " mm^3", "立方分米": " dm^3", "立方米": " m^3", "厘米": " cm", "毫米": " mm",
    "分米": " dm", "千米": " km", "公里": " km", "米": " m", "度": " degrees ", "平方单位": " units^2",
    "单位": " units", "元": " dollars", "个": " units", "或": ",", "和": ",", "派": " pi ", "选项": " ",
    "不等于": "!=", "不是": "!=", "不为": "!=", "等于": "=",
}  # fmt: skip
_CHINESE_WORD = re.compile("|".join(sorted(_CHINESE, key=len, reverse=True)))
_CHINESE_LEAD = re.compile(
    r"^\s*(?:所以|故|则|因此)?\s*(?:最终)?(?:答案|结果)?\s*(?:应?选择?(?!项)|是|为|等于|大?约)*\s*:?\s*"
)
# "The area is 48", but not "48 is wrong".
_CHINESE_IS = re.compile(r"(?<!不)[是为](?=\s*[\x21-\x7e])")

_STYLES = (
    "text|textrm|textbf|textit|textsf|texttt|textup|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mathnormal"
    r"|boldsymbol|bm|mbox|hbox|operatorname\*?|emph|underline|uline|rm|bf|it"
)
_STYLE = re.compile(rf"\\(?:{_STYLES})\s*\{{")
_BRACES = re.compile(rf"{_STYLE.pattern}|\\.|[{{}}]", re.DOTALL)
_COLOUR = re.compile(r"\\(?:textcolor|color)\s*\{[^{}\\]*\}(?=(\s*\{)?)")
_UPRIGHT = re.compile(r"\\(?:text|textrm|textup|textnormal|mathrm|mbox|hbox|operatorname\*?|rm)\s*\{")
_SPACES = {"\\,", "\\;", "\\:", "\\!", "\\ "}
_ASIDE = re.compile(r"(?:^|(?<=\s))\(([A-Za-z. ]+)\)")
_HEDGES = {"approximately", "approx", "about", "roughly", "around", "nearly"}
_DROPPED = re.compile(
    r"""\\(?:(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|q?quad|space|thinspace|checkmark
    |[lL]arge|LARGE|[hH]uge|small|normalsize|footnotesize|scriptsize|tiny|rm|bf|it|bfseries|itshape|rmfamily|em)
    (?![A-Za-z])|[,;:!>()$\ \[\]\\])
    |[$~]""",
    re.VERBOSE,
)
_DEGREE = re.compile(r"(?:\^\s*)?(?:\{\s*\\circ\s*\}|\\(?:circ|degree|textdegree)(?![A-Za-z]))")
# `{,}` and `\,` between groups of three digits can mean nothing else; a plain space is no space in LaTeX's mathematics,
# but `3 3/5` is a mixed number.
_SPACED_DIGITS = re.compile(
    r"(?<![0-9.])(?:[0-9]{1,3}(?:(?:\{,\}|,\\!|\\[,;: ])[0-9]{3})+|[0-9]+(?: +[0-9]+)+)(?![0-9]|\s*/)"
)
_COMMA_DIGITS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_NOT_DIGITS = re.compile(r"[^0-9]")
_TOKEN = re.compile(
    r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|\\[A-Za-z]+|\\.|[A-Za-z]+|\x02[^\x02]*\x02|<=|>=|!=|\S"
)
_SPELLINGS = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\surd": "sqrt", "\\cdot": "*", "\\times": "*",
    "\\ast": "*", "\\div": "/", "\\colon": ":", "\\%": "%", "percent": "%", "degree": "\\deg", "degrees": "\\deg",
    "deg": "\\deg", "pi": "\\pi", "Pi": "\\pi", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]",
    "\\langle": "(", "\\rangle": ")", "\\le": "<=", "\\leq": "<=", "\\ge": ">=", "\\geq": ">=", "\\ne": "!=",
    "\\neq": "!=", "\\in": "=", "\\thickapprox": "\\approx", "\\approxeq": "\\approx", "\\simeq": "\\approx",
    "\\lvert": "|", "\\rvert": "|", "\\vert": "|", "\\mid": "|", "\\lt": "<", "\\gt": ">",
    ";": ",", "or": ",", "and": ",",
}  # fmt: skip


def tokens(raw: str) -> list[str] | None:
    """Tokens of an answer; None where it is empty, too long or not text. Linear in its length; never raises."""
    if len(raw) > MAX_CHARS:
        return None
    text = raw.strip()
    if not text.isascii():
        text = _to_ascii(text)
    if not text or not text.replace("\n", " ").replace("\t", " ").isprintable():
        return None
    if "\\" in text or " " in text or "{,}" in text:
        text = _SPACED_DIGITS.sub(_digits_only, text)
    if "\\" in text:
        if "color" in text:
            text = _COLOUR.sub(_uncoloured, text)
        if _STYLE.search(text):
            text = _unstyled(text)
        text = _DEGREE.sub(r"\\deg ", text)
    if "\\" in text or "$" in text or "~" in text:
        text = _DROPPED.sub(" ", text)
    if "," in text:
        text = _COMMA_DIGITS.sub(_thousands, text)
    found = [_SPELLINGS.get(token) or _spelled(token) for token in _TOKEN.findall(text)]
    if found[-2:] in (["\\deg", "C"], ["\\deg", "F"]):
        found[-1] = "celsius" if found[-1] == "C" else "fahrenheit"
    while found and found[-1] in (".", ",", "\\"):
        found.pop()
    while len(found) > 1 and found[0] == "{" and closing(found) == len(found) - 1:
        found = found[1:-1]
    return found or None


def closing(found: Sequence[str]) -> int:
    """Position of the bracket that closes the first one, -1 where none does; half-open intervals may mix kinds."""
    depth = 0
    for position, token in enumerate(found):
        depth += (token in OPENING) - (token in OPENING.values())
        if depth == 0:
            return position
    return -1


def _to_ascii(text: str) -> str:
    """Symbols, full-width forms, digits of any script and Chinese units; what is left is no part of the grammar."""
    text = _CHINESE_LEAD.sub("", text.translate(_TRANSLATION))
    text = _CHINESE_IS.sub("=", _CHINESE_WORD.sub(lambda m: _CHINESE[m[0]], text))
    if text.isascii():
        return text
    return "".join(c if c.isascii() else str(unicodedata.decimal(c, c)) for c in text)


def _digits_only(match: re.Match[str]) -> str:
    return _NOT_DIGITS.sub("", match[0])


def _thousands(match: re.Match[str]) -> str:
    # Inside brackets a comma separates coordinates: (1,200) is a point.
    before = match.string[: match.start()]
    inside = any(before.count(a) > before.count(b) for a, b in ("()", "[]"))
    return match[0] if inside or before.count("\\{") > before.count("\\}") else match[0].replace(",", "")


def _spelled(token: str) -> str:
    """One spelling for each thing; `Degrees` is `degrees`, but `OR` and `AND` may be angles."""
    return _SPELLINGS.get(token) or (_SPELLINGS.get(token.lower()) if token.istitle() else None) or token


def _uncoloured(match: re.Match[str]) -> str:
    return "\\mathbf" if match[1] else " "


def _unstyled(text: str) -> str:
    """Style commands with a complete argument give way to what they hold, which needs no braces then: a style groups
    nothing that can be seen."""
    pieces: list[str] = []
    opened: list[tuple[int, bool]] = []
    end = 0
    for match in _BRACES.finditer(text):
        pieces.append(text[end : match.start()])
        end = match.end()
        brace = match[0]
        if brace == "}" and opened:
            start, style = opened.pop()
            if style:
                number = _UPRIGHT.match(pieces[start]) is not None and _follows_number(pieces[:start])
                pieces[start:] = [_content("".join(pieces[start + 1 :]), behind_number=number)]
                continue
        elif brace[-1] == "{" and brace != "\\{":
            opened.append((len(pieces), brace != "{"))
        pieces.append(brace)
    return "".join([*pieces, text[end:]])


def _follows_number(pieces: list[str]) -> bool:
    before = next((piece for piece in reversed(pieces) if piece.strip(" ~") and piece not in _SPACES), "")
    return before.rstrip(" ~")[-1:] in tuple("0123456789})")


def _content(content: str, *, behind_number: bool) -> str:
    """Numbers and formulas in `\\text{}` are read like any other; words stay together as prose."""
    words = _ASIDE.sub(r"\1", content).replace(".", " ").split()
    if not words or not all(word.isalpha() for word in words):
        return f" {content} "
    if words != (words := [word for word in words if word.lower() not in _HEDGES]) and not words:
        return " "
    if len(words[0]) == len(words) == 1:
        # An upright capital behind a number is a unit's symbol (48 N), elsewhere a name or a choice.
        return f" {TEXT}{words[0]}{TEXT} " if behind_number and words[0].isupper() else f" {content} "
    if (first := _spelled(words[0])) != words[0] or first in MULTIPLIERS or first in _SPELLINGS:
        return f" {first} " + (f"{TEXT}{' '.join(words[1:])}{TEXT} " if words[1:] else "")
    return f" {TEXT}{' '.join(words)}{TEXT} "
