"""Synthetic geometry, with the columns of the hub's Geometry3K: an image, a question, an answer.

The numbers are in the text and the figure is only in the image, so that the question has four possible answers for
a model that ignores it. Every image is drawn separately (place, size, proportions, colours), and each place and size
belongs to exactly one split: accuracy on a held-out split is accuracy on images that no other split has. (Holding
out pairs of numbers and figure instead would teach that those pairs do not occur.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image, ImageDraw

IMAGE_PIXELS = 32
"""Side of the square images."""

FIGURES = {
    "area": ("rectangle", "triangle", "ellipse", "frame"),
    "perimeter": ("triangle", "square", "hexagon", "cross"),
}
"""Figures by question. A frame is a rectangle with a hole of half its width and height; perimeter figures have equal
sides."""

_SIDES = {"triangle": 3, "square": 4, "hexagon": 6, "cross": 12}
# Areas come out whole (every formula divides by 4 at most), and a formula's first digit names the figure (3/4*w*h).
_NUMBERS: dict[str, tuple[tuple[int, ...], ...]] = {
    "area": tuple((w, h) for w in (2, 4, 5, 6, 7, 8, 9) for h in range(2, 10) if w * h % 4 == 0),
    "perimeter": tuple((side,) for side in range(2, 18)),
}
_HELD_OUT = ("validation", "test")


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
        """The right result; with `figure`, the result for an image mistaken for that figure."""
        figure = figure or self.figure
        if self.question == "perimeter":
            return f"{_SIDES[figure]}*{self.numbers[0]}"
        factor = {"rectangle": "", "triangle": "1/2*", "ellipse": "\\pi/4*", "frame": "3/4*"}[figure]
        return f"{factor}{self.numbers[0]}*{self.numbers[1]}"

    def answer(self, figure: str | None = None) -> str:
        """The value of `formula(figure)`."""
        figure = figure or self.figure
        if self.question == "perimeter":
            return str(_SIDES[figure] * self.numbers[0])
        area = math.prod(self.numbers)
        if figure == "ellipse":
            return ("" if area == 4 else str(area // 4)) + "\\pi"
        return str({"rectangle": area, "triangle": area // 2, "frame": area * 3 // 4}[figure])

    def demonstration(self, figure: str | None = None) -> str:
        """An answer in the required form, for an image taken for `figure`."""
        return f"<think>{self.formula(figure)}</think>\\boxed{{{self.answer(figure)}}}"


def exercises() -> dict[tuple[str, str], tuple[Exercise, ...]]:
    """All exercises there are, by (question, figure)."""
    return {
        (question, figure): tuple(Exercise(question, figure, numbers) for numbers in _NUMBERS[question])
        for question, figures in FIGURES.items()
        for figure in figures
    }


def draw_exercises(split: str, seed: int) -> Iterator[tuple[Exercise, Image.Image]]:
    """Endless exercises with an image each; the same sequence for the same arguments."""
    if split not in ("train", *_HELD_OUT):
        raise ValueError(f"split={split!r} is not one of train, {', '.join(_HELD_OUT)}")
    rng = random.Random(f"{seed}/{split}")
    by_kind = list(exercises().values())
    while True:
        exercise = rng.choice(rng.choice(by_kind))
        yield exercise, _draw(exercise.figure, split, rng)


def rows(split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` rows as the hub has them: images (list of PIL), problem, answer; and tags for slicing results.

    Args:
        split: train, validation or test. No image is in two of them.
        seed: another seed gives other images and another order.
    """
    for exercise, image in islice(draw_exercises(split, seed), count):
        yield {
            "images": [image],
            "problem": f"<image>{exercise.text}",
            "answer": exercise.answer(),
            "tags": [f"figure:{exercise.figure}", f"question:{exercise.question}"],
        }


@dataclass(frozen=True, slots=True)
class Box:
    """Where a figure stands in its image, in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def split(self) -> str:
        """A quarter of all places is held out, in two halves; neighbouring places are in different splits."""
        place = (self.left + 3 * self.top + 5 * self.width + 7 * self.height) % 8
        return {0: "validation", 1: "test"}.get(place, "train")


def _draw(figure: str, split: str, rng: random.Random) -> Image.Image:
    """The figure in one of the split's places, not to scale, in colours of its own."""
    box = _place(figure, rng)
    while box.split != split:
        box = _place(figure, rng)
    paper = tuple(rng.randint(225, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 110) for _ in range(3))
    image = Image.new("RGB", (IMAGE_PIXELS, IMAGE_PIXELS), paper)
    pen = ImageDraw.Draw(image)
    if figure == "ellipse":
        pen.ellipse((box.left, box.top, box.left + box.width, box.top + box.height), fill=ink)
    else:
        pen.polygon([(box.left + x * box.width, box.top + y * box.height) for x, y in _CORNERS[figure](rng)], fill=ink)
    if figure == "frame":
        x, y = box.left + box.width / 4, box.top + box.height / 4
        pen.rectangle((x, y, x + box.width / 2, y + box.height / 2), fill=paper)
    return image


def _place(figure: str, rng: random.Random) -> Box:
    width = rng.randint(19, 28)
    height = width if figure in ("square", "hexagon", "cross") else rng.randint(19, 28)
    return Box(rng.randint(1, IMAGE_PIXELS - 2 - width), rng.randint(1, IMAGE_PIXELS - 2 - height), width, height)


Corners = list[tuple[float, float]]


def _rectangle(rng: random.Random) -> Corners:
    return [(0, 0), (1, 0), (1, 1), (0, 1)]


def _triangle(rng: random.Random) -> Corners:
    corners: Corners = [(0, 1), (1, 1), (rng.uniform(0.3, 0.7), 0)]
    return [(x, 1 - y) for x, y in corners] if rng.random() < 0.5 else corners


def _hexagon(rng: random.Random) -> Corners:
    return [(0.5 + 0.5 * math.cos(math.pi * i / 3), 0.5 + 0.5 * math.sin(math.pi * i / 3)) for i in range(6)]


def _cross(rng: random.Random) -> Corners:
    a, b = 1 / 3, 2 / 3
    return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]


_CORNERS: dict[str, Callable[[random.Random], Corners]] = {
    "rectangle": _rectangle,
    "frame": _rectangle,
    "square": _rectangle,
    "triangle": _triangle,
    "hexagon": _hexagon,
    "cross": _cross,
}
