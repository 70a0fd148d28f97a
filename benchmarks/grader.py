"""Graders side by side: the same 1,000 realistic responses, in one run, on one core.

    python -m benchmarks.grader [--venv DIR]

Ours is measured in this process. The references (`mathruler` as the recipe uses it for Geometry3K, and `math-verify`)
are installed from PyPI into a virtual environment made for the occasion, never into this one, and measured there.
Every grader gets the responses three times, in turns; the best time counts. Exits with 1 where ours is not at least
20 times as fast as each reference.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from pathlib import Path
from random import Random

from dapo.rewards import equal, exact
from dapo.rewards.geometry3k import grade
from dapo.rewards.pool import RewardPool

PROMPTS, SAMPLES, ROUNDS, TARGET = 125, 8, 3, 20.0
REQUIREMENTS = ("mathruler==0.1.0", "math-verify==0.8.0", "pylatexenc", "tqdm")

REFERENCE = r"""
import json, re, sys, time, warnings
warnings.filterwarnings("ignore")
from math_verify import parse, verify
from mathruler.grader import extract_boxed_content, grade_answer

FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)

def mathruler(response, answer):
    well_formed = FORMAT.fullmatch(response) is not None
    return grade_answer(extract_boxed_content(response), answer), well_formed

def math_verify(response, answer):
    gold = parse("\\boxed{" + answer + "}", parsing_timeout=None)
    return verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None), True

rows = json.load(open(sys.argv[1]))
GRADERS = {"mathruler": mathruler, "math-verify": math_verify}
for grader in GRADERS.values():
    grader("<think></think>\\boxed{\\sqrt{2}}", "\\sqrt{3}")
for line in sys.stdin:
    grader = GRADERS[line.strip()]
    started = time.perf_counter()
    verdicts = [bool(grader(response, answer)[0]) for response, answer in rows]
    print(json.dumps([time.perf_counter() - started, verdicts]), flush=True)
"""


def responses(random: Random) -> list[tuple[str, str]]:
    """Like a policy in the middle of training on Geometry3K: 8 samples of a prompt, half of them right."""
    rows = []
    for _ in range(PROMPTS):
        truth, right, wrong = _question(random)
        for _ in range(SAMPLES):
            given = random.choice(right if random.random() < 0.5 else wrong)
            rows.append((f"<think>{_reasoning(random)}</think>\n{_conclusion(random, given)}", truth))
    return rows


def _question(random: Random) -> tuple[str, list[str], list[str]]:
    """A ground truth as the data set writes it, and right and wrong ways to answer."""
    n, m = random.randint(2, 180), random.choice([2, 3, 5, 6, 7, 10, 13, 221])
    a, b = random.randint(2, 30), random.choice([2, 3, 4, 5, 7, 9, 11])
    kind = random.choices(["integer", "decimal", "root", "fraction", "fraction of root", "pi"], [55, 14, 16, 8, 4, 3])[
        0
    ]
    if kind == "integer":
        right = [f"{n}"] * 6 + [f"{n}^\\circ", f"x = {n}", f"{n}.0", f"{n} \\text{{ cm}}"]
        return f"{n}", right, [f"{n + d}" for d in (-10, -2, -1, 1, 2, 10)] + [f"{180 - n + 1}^\\circ", f"{n / 7:.2f}"]
    if kind == "decimal":
        return f"{n}.{b}", [f"{n}.{b}"] * 4 + [f"{n}.{b}0"], [f"{n}.{b}3", f"{n}", f"{n}.{b - 1}", f"{n + 3}.{b}"]
    if kind == "root":
        right = [f"{a}\\sqrt{{{m}}}"] * 4 + [
            f"\\sqrt{{{a * a * m}}}",
            f"{a} \\sqrt {m}" if m < 10 else f"{a}*sqrt({m})",
        ]
        return (
            f"{a} \\sqrt {{ {m} }}",
            right,
            [f"{a + 1}\\sqrt{{{m}}}", f"{a}\\sqrt{{{m + 1}}}", f"{a * m**0.5:.2f}", f"{a}"],
        )
    if kind == "fraction":
        right = [f"\\frac{{{a}}}{{{b}}}"] * 3 + [f"{a}/{b}", f"\\dfrac{{{a}}}{{{b}}}"]
        return (
            f"\\frac {{ {a} }} {{ {b} }}",
            right,
            [f"\\frac{{{a + 1}}}{{{b}}}", f"\\frac{{{b}}}{{{a}}}", f"{a / b:.2f}", f"{a}"],
        )
    if kind == "fraction of root":
        right = [f"\\frac{{{a}\\sqrt{{{m}}}}}{{{m}}}"] * 3 + [f"\\frac{{{a}}}{{\\sqrt{{{m}}}}}"]
        return (
            f"\\frac {{ {a} \\sqrt {{ {m} }} }} {{ {m} }}",
            right,
            [f"\\frac{{{a}\\sqrt{{{m}}}}}{{2}}", f"{a}\\sqrt{{{m}}}"],
        )
    return f"{a} \\pi", [f"{a}\\pi"] * 3 + [f"{a}π"], [f"{a + 1}\\pi", f"{a * 3.1416:.2f}", f"{a}", f"{a * a}\\pi"]


SENTENCES = (
    "In the figure, $\\triangle ABC$ has its right angle at $C$, so the theorem of Pythagoras applies.",
    "We have $a^2 + b^2 = c^2$, that is $@^2 + @^2 = x^2$.",
    "The angles of a triangle add up to $180^\\circ$, hence $\\angle B = 180^\\circ - @^\\circ - @^\\circ$.",
    "Since the two chords are equally far from the center, they have the same length.",
    "By similarity, $\\frac{x}{@} = \\frac{@}{@}$.",
    "Wait, let me check this again: the tangent is perpendicular to the radius at the point of contact.",
    "Therefore $x = \\sqrt{@ + @}$, and the area is $\\frac{1}{2} \\cdot @ \\cdot @$.",
)
CONCLUSIONS = ("The answer is $\\boxed{@}$.", "\\boxed{@}", "Thus, $x = \\boxed{@}$.", "**Final answer:** \\boxed{@}")


def _reasoning(random: Random) -> str:
    chosen = " ".join(random.choice(SENTENCES) for _ in range(random.randint(4, 24)))
    return re.sub("@", lambda _: str(random.randint(2, 99)), chosen)


def _conclusion(random: Random, given: str) -> str:
    return random.choice(CONCLUSIONS).replace("@", given)


def measure(rows: list[tuple[str, str]], *, remember: bool) -> tuple[float, list[bool]]:
    """Seconds and verdicts of ours, starting with empty caches; without `remember`, emptied before every response."""
    caches = (equal._compare, equal._understood, exact.prime_factors)
    for cache in caches:
        cache.cache_clear()
    seconds, verdicts = 0.0, []
    for response, answer in rows:
        if not remember:
            for cache in caches:
                cache.cache_clear()
        started = time.perf_counter()
        verdicts.append(grade(response, answer).accuracy)
        seconds += time.perf_counter() - started
    return seconds, verdicts


def install(folder: Path) -> Path:
    """The references' own environment; returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {' '.join(REQUIREMENTS)} into {folder} ...")
        venv.create(folder, with_pip=True)
        quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
        subprocess.run([python, "-m", "pip", "install", *quiet, *REQUIREMENTS], check=True, stderr=subprocess.DEVNULL)
    return python


def compare(folder: Path) -> int:
    rows = responses(Random(0))
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    script = folder / "reference.py"
    script.write_text(REFERENCE)
    python = install(folder / "venv")
    references = ("mathruler", "math-verify")
    best: dict[str, float] = {}
    verdicts: dict[str, list[bool]] = {}

    def note(name: str, seconds: float, judged: list[bool]) -> None:
        best[name] = min(seconds, best.get(name, seconds))
        verdicts[name] = judged

    with subprocess.Popen(
        [python, script, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        for _ in range(ROUNDS):
            for name in references:
                print(name, file=other.stdin, flush=True)
                note(name, *json.loads(other.stdout.readline()))
                note("ours", *measure(rows, remember=True))
                note("ours, nothing remembered", *measure(rows, remember=False))
    with RewardPool("dapo.rewards.geometry3k:grade", workers=1) as pool:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            outcomes = pool.score(rows)
            note("ours, in a worker process", time.perf_counter() - started, [o.accuracy for o in outcomes])  # type: ignore[union-attr]
    report(rows, best, verdicts)
    return 0 if all(best[name] >= TARGET * best["ours"] for name in references) else 1


def report(rows: list[tuple[str, str]], best: dict[str, float], verdicts: dict[str, list[bool]]) -> None:
    lengths = sorted(len(response) for response, _ in rows)
    print(f"{len(rows)} responses of {lengths[0]} to {lengths[-1]} characters (median {lengths[len(rows) // 2]})")
    print(f"{'grader':28}{'ms':>10}{'us each':>10}{'right':>8}  ours is faster by")
    for name, seconds in sorted(best.items(), key=lambda pair: pair[1]):
        each, plain = seconds / best["ours"], seconds / best["ours, nothing remembered"]
        ratio = "" if name.startswith("ours") else f"{each:>10.0f}  (nothing remembered: {plain:.0f})"
        print(f"{name:28}{seconds * 1e3:>10.1f}{seconds * 1e6 / len(rows):>10.1f}{sum(verdicts[name]):>8}{ratio}")
    for name in ("mathruler", "math-verify"):
        pairs = Counter(zip(verdicts["ours"], verdicts[name], strict=True))
        print(f"right by ours only, not by {name}: {pairs[True, False]}; by {name} only: {pairs[False, True]}")
        differing = {
            (re.findall(r"\\boxed\{(.*)\}", response)[-1], truth)
            for (response, truth), a, b in zip(rows, verdicts["ours"], verdicts[name], strict=True)
            if a != b
        }
        print("  for example:", "; ".join(f"{given}  for  {truth}" for given, truth in sorted(differing)[:4]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", type=Path, metavar="DIR", help="keep the references' environment here and reuse it")
    options = parser.parse_args()
    if options.venv is not None:
        options.venv.mkdir(parents=True, exist_ok=True)
        return compare(options.venv)
    with tempfile.TemporaryDirectory(prefix="dapo-grader-") as folder:
        return compare(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
