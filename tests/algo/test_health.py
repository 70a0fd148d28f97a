"""Every alarm rings when it should, once, and says why."""

from __future__ import annotations

import json
import math

import pytest

from dapo.algo.health import Health
from dapo.config.algorithm import AlarmConfig

WELL = {
    "train/entropy": 0.5,
    "train/clipped_probability": 0.1,
    "train/empty_update": 0.0,
    "engine/gap_mean": 0.01,
    "groups/starved": 0.0,
}


def names(health: Health, step: int, **changed: float) -> list[str]:
    metrics = WELL | {name.replace("__", "/"): value for name, value in changed.items()}
    return [alarm.name for alarm in health.observe(step, metrics)]


@pytest.mark.parametrize(
    ("changed", "name", "says"),
    [
        ({"train/entropy": 0.01}, "entropy_collapse", "0.01 nats per token, below 0.02"),
        ({"engine/gap_mean": 0.3}, "gap_too_large", "0.3 nats per token on average, more than 0.1"),
        ({"train/clipped_probability": 0.5}, "clipped_probability_too_high", "mean probability of 0.5, above 0.2"),
        ({"train/grad_norm": math.nan, "train/loss": math.inf}, "not_finite", "train/grad_norm, train/loss"),
        ({"train/empty_update": 1.0}, "nothing_trained", "no token to train on"),
    ],
)
def test_an_alarm_rings_and_says_what_it_saw(changed: dict[str, float], name: str, says: str) -> None:
    health = Health(AlarmConfig())
    assert health.observe(1, WELL) == []
    (alarm,) = health.observe(2, WELL | changed)
    assert (alarm.name, alarm.step) == (name, 2)
    assert says in alarm.message


def test_starvation_rings_with_the_reasons() -> None:
    starved = {"groups/starved": 1.0, "groups/trained": 20, "groups/kept": 20, "groups/all_right": 300}
    (alarm,) = Health(AlarmConfig()).observe(5, WELL | starved | {"groups/all_wrong": 7, "groups/failed": 1})
    assert alarm.name == "starvation"
    assert "trained on 20 groups" in alarm.message
    assert "20 kept, 300 all right, 7 all wrong, 1 failed" in alarm.message


def test_reward_up_without_accuracy_rings() -> None:
    health = Health(AlarmConfig(window=6))
    rang = [names(health, s, groups__reward=0.5 + 0.05 * s, groups__accuracy=0.4) for s in range(1, 7)]
    assert rang == [[]] * 5 + [["reward_without_accuracy"]]


def test_reward_up_with_accuracy_is_what_we_want() -> None:
    health = Health(AlarmConfig(window=6))
    for step in range(1, 30):
        assert names(health, step, groups__reward=0.3 + 0.01 * step, groups__accuracy=0.3 + 0.01 * step) == []


def test_accuracy_that_trembles_does_not_silence_it() -> None:
    health = Health(AlarmConfig(window=6))
    accuracies = [0.40, 0.42, 0.39, 0.41, 0.40, 0.42]
    rang = [names(health, s, groups__reward=0.5 + 0.05 * s, groups__accuracy=a) for s, a in enumerate(accuracies)]
    assert rang[-1] == ["reward_without_accuracy"]


def test_a_reward_that_only_trembles_rings_nothing() -> None:
    health = Health(AlarmConfig(window=6))
    for step in range(1, 30):
        assert names(health, step, groups__reward=0.5 + 0.05 * (step % 2), groups__accuracy=0.4) == []


def test_an_alarm_rings_once_until_its_condition_was_gone() -> None:
    health = Health(AlarmConfig())
    entropies = [0.01, 0.01, 0.5, 0.01]
    rang = [names(health, step, train__entropy=value) for step, value in enumerate(entropies)]
    assert rang == [["entropy_collapse"], [], [], ["entropy_collapse"]]


def test_metrics_that_are_absent_ring_nothing() -> None:
    assert Health(AlarmConfig()).observe(1, {}) == []


def test_a_resumed_run_goes_on_with_what_it_had_seen() -> None:
    series = [{"groups__reward": 0.1 * s, "groups__accuracy": 0.4, "train__entropy": 0.01} for s in range(1, 12)]
    whole, first, second = (Health(AlarmConfig(window=6)) for _ in range(3))
    expected = [names(whole, step, **values) for step, values in enumerate(series)]
    actual = [names(first, step, **values) for step, values in enumerate(series[:4])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    actual += [names(second, step, **values) for step, values in enumerate(series[4:], start=4)]
    assert actual == expected
    assert actual[0] == ["entropy_collapse"]
    assert ["reward_without_accuracy"] in actual
