"""A user's reward is code like ours: edited, it is another grader under the same name."""

import pytest

from dapo.config import io
from dapo.eval.evaluate import make_folder, question_set
from dapo.eval.models import find_model
from dapo.observe import manifest

EASY = "def grade(response, answer):\n    return True\n"
STRICT = "def grade(response, answer):\n    return response == answer\n"


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """Its file, in the folder that a run starts from."""
    (tmp_path / "ours").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "ours" / "graders.py"
    file.write_text(EASY)
    return file


@pytest.fixture
def config(reward, tmp_path):
    return io.validate({"reward": {"function": "ours.graders:grade"}, "run_root": str(tmp_path / "runs")})


def test_it_is_a_reason_to_train(reward, config):
    function = config.reward.function
    before = manifest.code_digest(reward=function)
    assert manifest.code_digest(reward=function) == before != manifest.code_digest()
    reward.write_text(STRICT)
    assert manifest.code_digest(reward=function) != before


def test_models_are_measured_again(reward, config, tmp_path):
    before = question_set(config, tmp_path)
    model = find_model("base", config)
    folder = make_folder(config, model, tmp_path, tmp_path)
    assert make_folder(config, model, tmp_path, tmp_path) == folder
    reward.write_text(STRICT)
    assert question_set(config, tmp_path) != before
    assert make_folder(config, model, tmp_path, tmp_path) != folder


@pytest.mark.parametrize("function", ["nowhere.to.be_found:grade", "dapo.rewards.geometry3k:grade", "no colon"])
def test_ours_is_hashed_already_and_what_is_missing_is_the_run_s_to_name(function):
    assert manifest.code_digest(reward=function) == manifest.code_digest()
