"""A real engine, grader and process: measured once, goes on where it was killed, and says what is wrong."""

import json

import pytest

from dapo.config import io
from dapo.errors import RewardError, WeightsError
from dapo.eval.evaluate import make_folder
from dapo.eval.models import find_model
from dapo.runtime.evaluation import evaluate

pytestmark = pytest.mark.slow
PROMPTS = 12


def quiet(done, total, words):
    """Nobody listens."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Random weights and figures."""
    from dapo.data.prepare import prepare
    from dapo.data.tiny import make_tiny

    root = tmp_path_factory.mktemp("evaluate")
    config = io.validate(
        {
            "name": "letters",
            "device": "cpu",
            "run_root": str(root / "runs"),
            "data": {
                "source": {"kind": "synthetic", "train": 8, "validation": 8, "test": PROMPTS},
                "instruction": "",
                "max_prompt_tokens": 64,
                "cache_dir": str(root / "cache"),
            },
            "model": {"source": {"kind": "tiny", "warmup_steps": 0}, "compute_dtype": "float32"},
            "batch": {"max_response_tokens": 6, "tokens_per_pack": 2048},
            "rollout": {"max_num_seqs": 2},
            "reward": {"function": "tests.flows.easy_reward:begins_with_a_letter"},
            "validation": {"samples": 2, "top_p": 1.0},
        }
    )
    data = prepare(config.data, root / "cache")
    weights = make_tiny(config.model.source, root / "weights", quiet)
    return config, data, weights


def folder_for(world, **overrides):
    config, data, weights = world
    config = io.override(config, {key.replace("__", "."): value for key, value in overrides.items()})
    return make_folder(config, find_model("base", config), data, weights)


def test_an_evaluation_is_measured_once_and_goes_on_where_it_was_killed(world):
    folder = folder_for(world)
    reported = []
    measured = evaluate(folder, lambda *how_far: reported.append(how_far))
    assert reported[-1][:2] == (PROMPTS, PROMPTS)
    results = folder.read_results()
    assert len(results) == PROMPTS
    assert measured["metrics"]["val/prompts"] == PROMPTS
    assert measured["metrics"]["val/accuracy"] == pytest.approx(sum(r.accuracy for r in results.values()) / PROMPTS)
    assert {"mean@2", "pass@2", "maj@2"} == set(measured["estimates"])
    assert sum(s["prompts"] for tag, s in measured["slices"].items() if tag.startswith("question:")) == PROMPTS
    page = folder.page.read_text()
    assert "data:image/png;base64," in page
    assert f"All {PROMPTS} prompts" in page

    reported.clear()
    assert evaluate(folder, lambda *how_far: reported.append(how_far)) == measured
    assert reported == []

    # Killed in the middle of its ninth line.
    lines = folder.answers.read_text().splitlines(keepends=True)
    folder.answers.write_text("".join(lines[:8]) + lines[8][:40])
    for path in (folder.metrics, folder.results):
        path.unlink()
    again = evaluate(folder, quiet)
    assert f"8 of {PROMPTS} prompts were answered before" in folder.log.read_text()
    assert folder.read_results() == results
    assert {k: v for k, v in again["metrics"].items() if "time" not in k} == {
        k: v for k, v in measured["metrics"].items() if "time" not in k
    }


def test_other_questions_have_another_folder(world):
    first, other = folder_for(world), folder_for(world, validation__samples=4)
    assert first.root != other.root
    assert first.read_inputs()["set"] != other.read_inputs()["set"]
    seeded = folder_for(world, seed=7)
    assert seeded.root != first.root
    assert seeded.read_inputs()["set"] == first.read_inputs()["set"], "other streams, the same questions"


def test_a_broken_grader_is_an_error_not_an_accuracy_of_zero(world):
    folder = folder_for(world, reward__function="tests.flows.easy_reward:always_fails", validation__max_prompts=2)
    with pytest.raises(RewardError, match=r"4 of 4 checks of reward\.function=.* failed, .*; the first: Crashed"):
        evaluate(folder, quiet)
    assert not folder.done
    assert json.loads(folder.error.read_text())["error"] == "RewardError"


def test_weights_that_cannot_be_loaded_are_named(world, tmp_path):
    config, data, _ = world
    folder = make_folder(io.override(config, {"seed": 99}), find_model("base", config), data, tmp_path)
    with pytest.raises(WeightsError, match=r"no config\.json"):
        evaluate(folder, quiet)
