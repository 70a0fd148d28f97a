"""Topic 05: the reference's dynamic sampling, reproduced by `compat: verl`; what is right instead, by our own mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest

from dapo.algo.groups import GroupBuffer
from dapo.config.algorithm import SamplingFilterConfig
from dapo.errors import StarvationError
from dapo.observe.metrics import reward_metrics
from dapo.types import RolloutGroup
from tests.parity.cases import TOLERANCES, Case, assert_matches
from tests.records import group

UNLIMITED = 10**6
# Ours refuses a metric that does not exist when it reads the configuration, before anything is generated.
NOT_COMPARED = {"global_step_after", "error"}


@pytest.mark.golden("05_dynamic_sampling")
def test_the_same_responses_are_trained_on_or_it_fails_alike(case: Case) -> None:
    actual = run(case)
    if case.expected is None:
        pytest.skip(f"information only: {case.quirk}")
    assert (actual["error"] is None) == (case.expected.get("error") is None), actual["error"]
    compared = {key: value for key, value in case.expected.items() if key not in NOT_COMPARED}
    if actual["error"] == "ValidationError":
        compared.pop("gen_batches_generated")
    assert_matches(actual, compared, TOLERANCES["float32"])


def run(case: Case) -> dict[str, Any]:
    """The recipe's loop: generation batches until a step is full, over all epochs, until the steps are made."""
    given = case.inputs
    result: dict[str, Any] = {"steps": [], "error": None, "gen_batches_generated": 0}
    try:
        metric = _metric(case)
        config = SamplingFilterConfig(
            enabled=given.get("enable", True),
            metric=metric,  # type: ignore[arg-type]
            compat="verl" if case.ideal is None else "none",
            max_rounds=given["max_num_gen_batches"] if given["max_num_gen_batches"] > 0 else UNLIMITED,
        )
        buffer = GroupBuffer(config, given["train_batch_size"], len(given["gen_batches"][0]))
        batches = _batches(case, metric)
        while len(result["steps"]) < given.get("steps", 1):
            buffer.begin_step(policy_version=len(result["steps"]))
            while buffer.next_round_size() > 0:
                buffer.add(next(batches))
                result["gen_batches_generated"] += 1
            result["steps"].append(_step(given, buffer.take(), buffer.report().rounds))
    except StopIteration:
        pass
    except (StarvationError, ValueError) as error:
        result["error"] = type(error).__name__
    return result


def _metric(case: Case) -> str:
    """A yes-or-no value is ours as accuracy; any other number is compared as a reward."""
    name = case.inputs["metric"]
    if name in ("score", "seq_reward", "seq_final_reward"):
        return "reward"
    if name != "acc":
        return name
    values = {value for batch in case.inputs["gen_batches"] for asked in batch for value in asked["acc"]}
    return "accuracy" if values <= {0, 1, "NaN"} or case.quirk == "acc-includes-format" else "reward"


def _batches(case: Case, metric: str) -> Iterator[list[RolloutGroup]]:
    epochs = case.inputs.get("total_epochs", 1)
    for batch in chain.from_iterable([case.inputs["gen_batches"]] * epochs):
        yield [_group(case.inputs, asked, metric) for asked in batch]


def _group(given: Mapping[str, Any], asked: Mapping[str, Any], metric: str) -> RolloutGroup:
    # The quirk's acc is 0.9 * accuracy + 0.1 * format; a NaN is a check that failed.
    verdicts = [None if value == "NaN" else value >= 0.5 for value in asked["acc"]]
    rewards = asked["reward"]
    if metric == "reward":
        rewards = asked[{"seq_reward": "reward", "seq_final_reward": "reward"}.get(given["metric"], given["metric"])]
        if given["metric"] == "seq_final_reward" and "kl" in given:
            kl = given["kl"][str(asked["uid"])]
            rewards = [reward - given["kl_coef"] * k for reward, k in zip(rewards, kl, strict=True)]
    return group(str(asked["uid"]), verdicts, rewards=rewards)


def _step(given: Mapping[str, Any], groups: list[RolloutGroup], rounds: int) -> dict[str, Any]:
    uids = [int(g.prompt.id) for g in groups]
    reward = {asked["uid"]: asked["reward"] for batch in given["gen_batches"] for asked in batch}
    mean = reward_metrics([replace(g, rewards=reward[uid]) for uid, g in zip(uids, groups, strict=True)])["reward/mean"]
    return {
        "trajectories": [[uid, r.sample] for uid, g in zip(uids, groups, strict=True) for r in g.rollouts],
        "kept_uids": list(dict.fromkeys(uids)),
        "num_gen_batches": rounds,
        "score_mean": mean,
    }
