"""Geometry we draw ourselves, with the columns of the hub's Geometry3K: a picture, a question, an answer.

The numbers are in the text and the figure is only in the picture, so that the question has four possible answers for
somebody who does not look. An exercise (figure, question, numbers) belongs to exactly one split, and every picture is
drawn anew (place, size, proportions, colours): accuracy on a held-out split is generalisation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

IMAGE_PIXELS = 32
"""Side of the square pictures."""

FIGURES = {
    "area": ("rectangle", "triangle", "ellipse", "notch"),
    "perimeter": ("triangle", "square", "hexagon", "cross"),
}
"""Figures by question. A notch is a rectangle without one of its quarters; the perimeter figures have equal sides."""

_SIDES = {"triangle": 3, "square": 4, "hexagon": 6, "cross": 12}
# Areas come out whole: every formula divides by 4 at most.
_NUMBERS: dict[str, tuple[tuple[int, ...], ...]] = {
    "area": tuple((w, h) for w in range(2, 10) for h in range(2, 10) if w * h % 4 == 0),
    "perimeter": tuple((side,) for side in range(2, 18)),
}
_SPLITS = {"validation": 0, "test": 1}
_HELD_OUT_OF = 8


@dataclass(frozen=True, slots=True)
class Exercise:
    """What is asked, about which figure, with which numbers."""

    question: str
    figure: str
    numbers: tuple[int, ...]

    @property
    def text(self) -> str:
        """The question as the model reads it; the same for every figure."""
        if self.question == "area":
            return f"width={self.numbers[0]} height={self.numbers[1]} area?"
        return f"side={self.numbers[0]} perimeter?"

    def formula(self, figure: str | None = None) -> str:
        """What to compute; with `figure`, what somebody would compute who takes the picture for that figure."""
        figure = figure or self.figure
        if self.question == "perimeter":
            return f"{_SIDES[figure]}*{self.numbers[0]}"
        factor = {"rectangle": "", "triangle": "1/2*", "ellipse": "\\pi/4*", "notch": "3/4*"}[figure]
        return f"{factor}{self.numbers[0]}*{self.numbers[1]}"

    def answer(self, figure: str | None = None) -> str:
        """The value of `formula(figure)`."""
        figure = figure or self.figure
        if self.question == "perimeter":
            return str(_SIDES[figure] * self.numbers[0])
        area = math.prod(self.numbers)
        if figure == "ellipse":
            return ("" if area == 4 else str(area // 4)) + "\\pi"
        return str({"rectangle": area, "triangle": area // 2, "notch": area * 3 // 4}[figure])


def exercises(split: str) -> dict[tuple[str, str], tuple[Exercise, ...]]:
    """All exercises of a split, by (question, figure).

    A quarter of each figure's numbers is held out, in two halves for `validation` and `test`; which ones differs from
    figure to figure, so that the training split has every number with other figures.
    """
    if split not in ("train", *_SPLITS):
        raise ValueError(f"split={split!r} is not one of train, {', '.join(_SPLITS)}")
    out: dict[tuple[str, str], tuple[Exercise, ...]] = {}
    for question, figures in FIGURES.items():
        for shift, figure in enumerate(figures):
            places = [(i + 2 * shift) % _HELD_OUT_OF for i in range(len(_NUMBERS[question]))]
            out[question, figure] = tuple(
                Exercise(question, figure, numbers)
                for place, numbers in zip(places, _NUMBERS[question], strict=True)
                if (place == _SPLITS[split] if split in _SPLITS else place not in _SPLITS.values())
            )
    return out


def draw_exercises(split: str, seed: int) -> Iterator[tuple[Exercise, Image.Image]]:
    """Endless exercises of a split with a picture each; the same sequence for the same arguments."""
    rng = random.Random(f"{seed}/{split}")
    by_kind = list(exercises(split).values())
    while True:
        exercise = rng.choice(rng.choice(by_kind))
        yield exercise, draw(exercise.figure, rng)


def rows(split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` rows as the hub has them: images (list of PIL), problem, answer; and tags for slicing results.

    Args:
        split: train, validation or test. No exercise is in two of them.
        seed: another seed gives other pictures and another order.
    """
    for index, (exercise, image) in enumerate(draw_exercises(split, seed)):
        if index == count:
            return
        yield {
            "images": [image],
            "problem": f"<image>{exercise.text}",
            "answer": exercise.answer(),
            "tags": [f"figure:{exercise.figure}", f"question:{exercise.question}"],
        }


def draw(figure: str, rng: random.Random) -> Image.Image:
    """The figure somewhere in a picture of 32 x 32, not to scale."""
    width = rng.randint(17, 28)
    height = rng.randint(17, 28)
    if figure in ("square", "hexagon", "cross"):
        height = width
    left, top = rng.randint(1, IMAGE_PIXELS - 2 - width), rng.randint(1, IMAGE_PIXELS - 2 - height)
    paper = tuple(rng.randint(200, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 140) for _ in range(3))
    image = Image.new("RGB", (IMAGE_PIXELS, IMAGE_PIXELS), paper)
    pen = ImageDraw.Draw(image)
    if figure == "ellipse":
        pen.ellipse((left, top, left + width, top + height), fill=ink)
    else:
        corners = _CORNERS[figure](rng)
        pen.polygon([(left + x * width, top + y * height) for x, y in corners], fill=ink)
    return image


Corners = list[tuple[float, float]]


def _rectangle(rng: random.Random) -> Corners:
    return [(0, 0), (1, 0), (1, 1), (0, 1)]


def _triangle(rng: random.Random) -> Corners:
    corners: Corners = [(0, 1), (1, 1), (rng.uniform(0.3, 0.7), 0)]
    return [(x, 1 - y) for x, y in corners] if rng.random() < 0.5 else corners


def _notch(rng: random.Random) -> Corners:
    corners: Corners = [(0, 0), (0.5, 0), (0.5, 0.5), (1, 0.5), (1, 1), (0, 1)]
    mirror_x, mirror_y = rng.random() < 0.5, rng.random() < 0.5
    return [(1 - x if mirror_x else x, 1 - y if mirror_y else y) for x, y in corners]


def _hexagon(rng: random.Random) -> Corners:
    return [(0.5 + 0.5 * math.cos(math.pi * i / 3), 0.5 + 0.5 * math.sin(math.pi * i / 3)) for i in range(6)]


def _cross(rng: random.Random) -> Corners:
    a, b = 1 / 3, 2 / 3
    return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]


_CORNERS: dict[str, Callable[[random.Random], Corners]] = {
    "rectangle": _rectangle,
    "square": _rectangle,
    "triangle": _triangle,
    "notch": _notch,
    "hexagon": _hexagon,
    "cross": _cross,
}
