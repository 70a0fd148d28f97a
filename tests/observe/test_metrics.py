"""The metrics of a step, by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dapo.algo.groups import GroupBuffer
from dapo.config.algorithm import SamplingFilterConfig
from dapo.eval.results import of_groups, val_metrics
from dapo.observe.journal import read
from dapo.observe.metrics import reward_metrics, speed_metrics, step_metrics, update_metrics
from tests.records import group, prompt
from tests.runtime import fakes

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def small_step() -> dict[str, float]:
    buffer = GroupBuffer(SamplingFilterConfig(max_rounds=1), 4)
    buffer.begin_step(0)
    answers = [[True, False], [True, True], [False, False], [None, None], [None, True, False]]
    buffer.add(
        [group(str(i), a, lengths=[4, 8, 2][: len(a)], cut=[1] if i == 0 else []) for i, a in enumerate(answers)]
    )
    updates = [
        {"loss": 1.0, "entropy": 0.5, "gap_mean": 0.1, "tokens": 30.0, "lr": 1e-6, "max_ratio_error": 0.0},
        {"loss": 3.0, "entropy": 0.1, "gap_mean": 0.1, "tokens": 10.0, "lr": 2e-6, "max_ratio_error": 0.7},
    ]
    return step_metrics(buffer.take(), updates, buffer.report(), responses=100)


def test_a_step_is_counted_by_hand() -> None:
    metrics = small_step()
    assert metrics["reward/mean"] == 0.5  # two groups were kept: one right and one wrong each
    assert metrics["reward/accuracy"] == 0.5
    assert metrics["reward/failed"] == 1 / 5
    assert metrics["response/length_mean"] == (4 + 8 + 4 + 8 + 2) / 5
    assert metrics["response/truncated"] == 1 / 5
    verdicts = {name: metrics[f"groups/{name}"] for name in ("kept", "all_right", "all_wrong", "failed", "truncated")}
    assert verdicts == {"kept": 2, "all_right": 1, "all_wrong": 1, "failed": 1, "truncated": 0}
    assert metrics["groups/accuracy"] == 4 / 8  # of all generated responses with a verdict
    assert metrics["groups/reward"] == 4 / 8
    outcomes = {name: metrics[f"outcomes/{name}"] for name in ("scored", "truncated", "timed_out", "crashed")}
    assert outcomes == {"scored": 7, "truncated": 1, "timed_out": 0, "crashed": 3}
    assert metrics["groups/trained"] == 2
    assert metrics["groups/starved"] == 1.0
    assert metrics["groups/responses_per_trained"] == 11 / 5
    assert metrics["groups/responses_total"] == 100


def test_updates_are_weighted_by_their_tokens() -> None:
    metrics = small_step()
    assert metrics["train/loss"] == pytest.approx(1.5)
    assert metrics["train/entropy"] == pytest.approx(0.4)
    assert metrics["train/tokens"] == 40
    assert metrics["train/lr"] == 2e-6
    assert metrics["train/max_ratio_error"] == 0.0
    assert metrics["engine/gap_mean"] == pytest.approx(0.1)


def test_updates_without_a_token_are_averaged_plainly() -> None:
    metrics = update_metrics([{"grad_norm": 2.0, "tokens": 0.0}, {"grad_norm": 4.0, "tokens": 0.0}])
    assert metrics["train/grad_norm"] == 3.0


def test_a_failed_check_has_no_reward() -> None:
    metrics = reward_metrics([group("a", [True, None, None])])
    assert metrics["reward/mean"] == metrics["reward/accuracy"] == 1.0
    assert metrics["reward/failed"] == pytest.approx(2 / 3)


def test_speed_counts_every_trained_token_per_device() -> None:
    groups = [group("a", [True, False], lengths=[6, 4], asked=prompt("a", 5))]
    metrics = speed_metrics(groups, {"generate": 2.0, "update": 1.0, "step": 4.0}, devices=5)
    assert metrics["time/tokens_per_device_s"] == 1.0
    assert metrics["time/ms_per_token/generate"] == 200.0
    assert metrics["time/ms_per_token/update"] == 50.0


def documented() -> str:
    """An expression for all names in docs/metrics.md."""
    rows = re.findall(r"^\| (`[^|]+`)", DOCS.read_text(), re.MULTILINE)
    names = {name for row in rows for name in re.findall("`([^`]+)`", row)}
    return "|".join(re.sub("<[a-z]+>", "[^/]+", re.escape(name)) for name in names)


def test_every_logged_name_is_documented() -> None:
    several = group("a", [True, False], asked=prompt("a", tags=("shape:circle",)))
    logged = (
        small_step() | val_metrics(of_groups([several])) | speed_metrics([several], {"update": 1.0, "step": 1.0}, 1)
    )
    assert [name for name in logged if not re.fullmatch(documented(), name)] == []


def test_every_name_of_a_whole_run_is_documented(tmp_path: Path) -> None:
    controller, _, folder = fakes.make(tmp_path, rollout={"probe_every": 1})
    controller.run()
    logged = {name for event in read(folder.journal) if event.kind == "step" for name in event.data["metrics"]}
    assert {"engine/probe_mean", "engine/restarts", "time/sync_copy"} < logged
    assert [name for name in logged if not re.fullmatch(documented(), name)] == []
