"""The drawn geometry: right answers, an image that is needed, splits that share none."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import islice

import pytest
from PIL import Image, ImageChops

from dapo.data.synthetic import FIGURES, Exercise, draw_exercises, exercises, rows
from dapo.rewards.geometry3k import grade


def figure_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is not paper; figures keep away from the corner."""
    paper = Image.new("RGB", image.size, image.getpixel((0, 0)))
    box = ImageChops.difference(image, paper).getbbox()
    assert box is not None
    return box


def ink_share(image: Image.Image) -> float:
    """Share of the figure's box that is not paper."""
    left, top, right, bottom = figure_box(image)
    paper = image.getpixel((0, 0))
    pixels = [image.getpixel((x, y)) for x in range(left, right) for y in range(top, bottom)]
    return sum(pixel != paper for pixel in pixels) / len(pixels)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (Exercise("area", "rectangle", (6, 4)), "24"),
        (Exercise("area", "triangle", (6, 4)), "12"),
        (Exercise("area", "ellipse", (6, 4)), "6\\pi"),
        (Exercise("area", "ellipse", (2, 2)), "\\pi"),
        (Exercise("area", "frame", (6, 4)), "18"),
        (Exercise("perimeter", "triangle", (7,)), "21"),
        (Exercise("perimeter", "square", (7,)), "28"),
        (Exercise("perimeter", "hexagon", (7,)), "42"),
        (Exercise("perimeter", "cross", (7,)), "84"),
    ],
)
def test_answers_are_those_of_a_school_book(exercise: Exercise, answer: str) -> None:
    assert exercise.answer() == answer


def test_every_formula_has_the_value_of_its_answer() -> None:
    for exercise in (e for kind in exercises().values() for e in kind):
        value = math.prod(Fraction(factor.replace("\\pi", "1")) for factor in exercise.formula().split("*"))
        expected = exercise.answer().replace("\\pi", "") or "1"
        assert value == int(expected), exercise
        assert ("\\pi" in exercise.formula()) == ("\\pi" in exercise.answer()), exercise


def test_without_the_picture_a_question_has_four_answers() -> None:
    for (question, figure), kind in exercises().items():
        for exercise in kind:
            assert len({exercise.answer(other) for other in FIGURES[question]}) == 4, (figure, exercise)
            assert not any(other in exercise.text for other in FIGURES[question])


def test_the_first_digit_of_a_formula_tells_the_figure() -> None:
    for (question, _), kind in exercises().items():
        for exercise in kind:
            beginnings = {exercise.formula(figure)[:1] for figure in FIGURES[question]}
            assert len(beginnings) == 4, exercise


def test_the_grader_accepts_the_right_demonstration_and_no_other() -> None:
    for (question, _), kind in exercises().items():
        exercise = kind[3]
        for figure in FIGURES[question]:
            scored = grade(exercise.demonstration(figure), exercise.answer())
            assert scored.accuracy == (figure == exercise.figure), exercise
            assert scored.format == 1.0


@pytest.mark.parametrize(
    ("figure", "share"),
    [("rectangle", 1.0), ("triangle", 0.5), ("ellipse", math.pi / 4), ("frame", 0.75), ("cross", 5 / 9)],
)
def test_the_picture_shows_the_area_that_the_formula_claims(figure: str, share: float) -> None:
    drawn = (image for exercise, image in draw_exercises("train", 0) if exercise.figure == figure)
    shares = [ink_share(image) for image in islice(drawn, 20)]
    assert sum(shares) / len(shares) == pytest.approx(share, abs=0.06)


def test_no_place_of_a_figure_is_in_two_splits() -> None:
    places = {
        split: {(e.figure, figure_box(image)) for e, image in islice(draw_exercises(split, seed=1), 3000)}
        for split in ("train", "validation", "test")
    }
    assert not places["train"] & places["validation"]
    assert not places["train"] & places["test"]
    assert not places["validation"] & places["test"]


def test_all_kinds_of_exercise_are_about_equally_frequent_in_each_split() -> None:
    for split in ("train", "validation", "test"):
        kinds = [(e.question, e.figure) for e, _ in islice(draw_exercises(split, 0), 800)]
        assert set(kinds) == set(exercises())
        assert all(60 < kinds.count(kind) < 140 for kind in set(kinds))


def test_rows_have_the_columns_of_the_hub_and_the_marker_of_the_image() -> None:
    row = next(rows("train", 1, seed=0))
    assert sorted(row) == ["answer", "images", "problem", "tags"]
    assert row["problem"].startswith("<image>")
    assert [image.size for image in row["images"]] == [(32, 32)]
    assert [tag.split(":")[0] for tag in row["tags"]] == ["figure", "question"]


def test_rows_are_the_same_again_for_the_same_seed_and_others_for_another() -> None:
    def content(split: str, seed: int) -> list[tuple[str, str, bytes]]:
        return [(r["problem"], r["answer"], r["images"][0].tobytes()) for r in rows(split, 20, seed)]

    assert content("train", 0) == content("train", 0)
    assert content("train", 0) != content("train", 1)
    assert content("train", 0) != content("test", 0)
    assert len(content("test", 0)) == 20


def test_an_unknown_split_is_refused_with_the_names_of_the_known() -> None:
    with pytest.raises(ValueError, match="train, validation, test"):
        next(rows("dev", 1, seed=0))
