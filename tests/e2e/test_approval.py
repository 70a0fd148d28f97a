"""A deployment's retraining asks a person: it holds no process meanwhile, and goes on where it was with the answer."""

import json
from pathlib import Path

import pytest

from dapo.observe.journal import read
from dapo.observe.registry import CHALLENGER, CHAMPION, Registry
from dapo.runtime import processes
from flows.recovery import LABEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAME = "letters"
OVERRIDES = (
    "name=letters",
    "data.source.train=32",
    "data.source.validation=32",
    "data.source.test=8",
    "model.source.warmup_steps=0",
    "model.parallel.world_size=1",
    "batch.prompts_per_step=8",
    "batch.prompts_per_round=8",
    "batch.prompts_per_update=8",
    "batch.max_response_tokens=6",
    "reward.function=tests.flows.easy_reward:begins_with_a_letter",
    "validation.before_training=false",
    "train.steps=1",
    "train.test_freq=0",
    "train.save_freq=0",
    f"mlflow.registered_model={NAME}",
)
LIMITS = ("max_length_growth", "max_format_loss", "max_truncated_gain", "max_slice_loss")


def test_a_yes_moves_the_alias_and_repeats_nothing(servers):
    runs = servers.home / "approval"
    places = (f"run_root={runs}", f"data.cache_dir={servers.home}/cache")
    flow_run = servers.run(
        "retrain/geo3k-weekly",
        (*OVERRIDES, *places),
        config_path="configs/geo3k_tiny.yaml",
        because="asked",
        approval=True,
        gate=dict.fromkeys(LIMITS) | {"min_gain": -1, "min_prompts": 1},
        gate_overrides=[],
    )

    def waits() -> bool:
        found = servers.flow_run(flow_run)
        assert found["state_type"] not in {"FAILED", "CRASHED"}, found["state"]["message"]
        return found["state_name"] == "Suspended"

    servers.wait_until(waits, "the flow run is suspended", 240)
    process = int(servers.flow_run(flow_run)["infrastructure_pid"].rpartition(":")[2])
    servers.wait_until(lambda: processes.look(process) is None, "its process is gone", 30)
    assert servers.flow_run(flow_run)["labels"][LABEL] == "", "nobody takes it for one that crashed"
    registry = Registry(servers.mlflow, NAME)
    assert registry.aliases() == {CHALLENGER: 1}
    assert registry.require(1).tags["gate.decision"] == "awaits approval"
    answers = {path: path.stat().st_mtime_ns for path in Path(runs).glob("evaluations/*/metrics.json")}
    assert len(answers) == 2, "of the base and of the challenger"

    said = {"run_input": {"decision": "promote", "note": "looks good"}}
    assert servers.ask("POST", f"/flow_runs/{flow_run}/resume", said)["status"] == "ACCEPT"
    servers.wait_until(lambda: servers.state(flow_run) in {"COMPLETED", "FAILED", "CRASHED"}, "it has ended", 120)
    found = servers.flow_run(flow_run)
    assert found["state_type"] == "COMPLETED", found["state"]["message"]
    assert int(found["infrastructure_pid"].rpartition(":")[2]) != process
    assert registry.aliases() == {CHALLENGER: 1, CHAMPION: 1}
    assert registry.require(1).tags["gate.decision"] == "promoted"
    decision = json.loads((runs / "decisions" / f"{NAME}-v1.json").read_text())
    assert decision["approval"] == {"decision": "promote", "note": "looks good"}

    [journal] = runs.glob("letters-retrain-*/journal.jsonl")
    assert [e.kind for e in read(journal) if e.kind in ("started", "step", "ended")] == ["started", "step", "ended"]
    assert {path: path.stat().st_mtime_ns for path in Path(runs).glob("evaluations/*/metrics.json")} == answers
