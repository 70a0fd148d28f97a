"""A list of flow runs says which model, which data and when."""

import re

import pytest

from flows import names

PLACE = {"config_path": "configs/geo3k.yaml"}
DATE = r"-\d{4}-\d\d-\d\d-\d{6}$"


def test_a_training_and_a_retraining():
    assert_named(names.of_training(PLACE), "Qwen3-VL-30B-A3B-Instruct-DAPO-Qwen3-vl-30B-geometry3k")
    given = PLACE | {"overrides": {"data.source": {"kind": "folder", "path": "/mnt/figures"}}}
    assert_named(
        names.of_training(given, "every Monday"), "Qwen3-VL-30B-A3B-Instruct-DAPO-Qwen3-vl-30B-figures-every Monday"
    )
    assert_named(names.of_training({}), "tiny-geo3k-tiny-synthetic")
    assert_named(names.of_training({"overrides": {"clip.hihg": 1}}), "not-valid")


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("models:/dapo-geo3k@champion", "dapo-geo3k@champion"),
        ("models:/dapo-geo3k/3", "dapo-geo3k-3"),
        ("runs/geo3k-1a2b3c4d/checkpoints/step-000060/hf", "geo3k-1a2b3c4d-step-000060"),
        ("runs/geo3k-1a2b3c4d", "geo3k-1a2b3c4d"),
        ("OWNER/NAME", "NAME"),
        ("base", "Qwen3-VL-30B-A3B-Instruct"),
    ],
)
def test_an_evaluation(model, named):
    assert_named(names.of_evaluation(PLACE | {"model": model}), f"{named}-geometry3k-test")
    assert_named(
        names.of_evaluation(PLACE | {"model": model, "data": "cache/data/figures-1"}), f"{named}-figures-1-test"
    )


def assert_named(name, beginning):
    assert re.fullmatch(re.escape(beginning) + DATE, name), name
