"""Retraining for real: training on Ray, evaluation, gate and registry, with a model of a million random weights.

One story, in order, for every start of Ray costs seconds: the first training promotes because it is better, the second
is not needed, the third is refused because it learned nothing, the fourth finds another champion than it set out with.
"""

import contextvars
import json
import threading
import time
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo.config import io
from dapo.errors import DataError
from dapo.eval.evaluate import EvaluationFolder
from dapo.observe.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry
from dapo.observe.shipper import tracking_uri
from dapo.runtime import cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("prefect_api")]

NAME = "letters"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("retrain")
    config = io.validate(
        {
            "name": "letters",
            "device": "cpu",
            "run_root": str(root / "runs"),
            "data": {
                "source": {"kind": "synthetic", "train": 64, "validation": 64, "test": 8},
                "instruction": "",
                "max_prompt_tokens": 64,
                "cache_dir": str(root / "cache"),
            },
            "model": {
                "source": {"kind": "tiny", "warmup_steps": 0},
                "compute_dtype": "float32",
                "gradient_checkpointing": False,
                "optimizer": {"lr": 1e-3, "warmup_updates": 0, "weight_decay": 0.0},
            },
            "batch": {
                "prompts_per_step": 16,
                "prompts_per_update": 8,
                "group_size": 8,
                "max_response_tokens": 6,
                "tokens_per_pack": 2048,
            },
            "reward": {"function": "tests.flows.easy_reward:begins_with_a_letter", "format_weight": 0.0},
            "validation": {"before_training": False, "samples": 2, "top_p": 1.0},
            "train": {"steps": 6, "test_freq": 0, "save_freq": 0},
            "mlflow": {"registered_model": NAME},
        }
    )
    yield config
    assert cluster.stop_local(config) == []


def retrain(config, **options):
    from flows.retrain import retrain as flow

    return flow(config=config, **options)


def decision(config, version):
    return json.loads((Path(config.run_root) / "decisions" / f"{NAME}-v{version}.json").read_text())


def test_a_life(config, monkeypatch):
    registry = Registry(tracking_uri(config), NAME)

    # Random weights end their answers by chance; a model that writes letters is cut off a little more often.
    said = retrain(config, gate={"max_truncated_gain": None})
    saved = decision(config, 1)
    assert said.startswith("promoted: accuracy "), said
    assert saved["promote"] is True
    assert saved["because"] == "there is no champion yet"
    assert saved["versions"] == {"champion": None, "challenger": 1}
    assert saved["difference"]["low"] > 0
    assert registry.aliases() == {CHALLENGER: 1, CHAMPION: 1}
    folders = [EvaluationFolder(p.parent) for p in Path(config.run_root).glob("evaluations/*/metrics.json")]
    assert {f.read_inputs()["model"]["reference"] for f in folders} > {"base"}
    assert len({f.read_inputs()["set"] for f in folders}) == 1, "both were asked the same"
    assert {len(f.read_results()) for f in folders} == {64}, "the split that training does not look at"

    said = retrain(config)
    assert said.startswith("skipped: neither data"), said

    # Nothing is learned at this rate: whatever the difference is, it is noise.
    still = io.override(config, {"model.optimizer.lr": 1e-12, "train.steps": 1})
    said = retrain(still, because="every Monday")
    saved = decision(config, 2)
    assert said.startswith("refused: accuracy "), said
    assert saved["promote"] is False
    assert saved["because"] == "every Monday"
    assert [c["name"] for c in saved["checks"] if not c["passed"]] == ["gain"]
    assert saved["difference"]["low"] <= 0 <= saved["difference"]["high"]
    assert registry.aliases() == {CHALLENGER: 2, CHAMPION: 1}
    assert registry.require(2).tags["gate.decision"] == "refused"
    assert registry.require(2).tags["weights.from"] == str(registry.require(1).folder)


@pytest.mark.nightly
def test_a_champion_that_changed_meanwhile_is_the_one_to_beat(config):
    """While a person thinks about a promotion over version 1, somebody promotes version 2."""
    registry = Registry(tracking_uri(config), NAME)

    def answers():
        say({"decision": "promote"}, first=lambda: registry.promote(registry.require(2), over=registry.require(1)))
        say({"decision": "promote", "note": "over 2, too"})

    in_background(answers)
    still = io.override(config, {"model.optimizer.lr": 1e-12, "train.steps": 1})
    limits = ("min_gain", "max_length_growth", "max_format_loss", "max_truncated_gain", "max_slice_loss")
    said = retrain(still, because="new figures", approval=True, gate=dict.fromkeys(limits) | {"min_gain": -1})
    assert said.startswith("promoted: accuracy "), said
    saved = decision(config, 3)
    assert saved["versions"] == {"champion": 2, "challenger": 3}
    assert saved["approval"] == {"decision": "promote", "note": "over 2, too"}
    assert registry.aliases() == {CHALLENGER: 3, CHAMPION: 3, PREVIOUS: 2}
    assert registry.require(3).tags["gate.against"] == "2"
    assert len(list(Path(config.run_root).glob("letters-retrain-*"))) == 3, "nothing was trained a second time"


def test_a_person_may_say_no():
    from prefect import flow

    from flows.retrain import _asked

    @flow
    def ask():
        return _asked(NAME, 3, 2, {"reasons": ["accuracy 0.5 -> 0.6"]}, hours=0.05)

    in_background(lambda: say({"decision": "keep the champion", "note": "not on a Friday"}))
    assert ask() == {
        "promote": False,
        "reasons": ["not approved: not on a Friday"],
        "approval": {"decision": "keep the champion", "note": "not on a Friday"},
    }


def test_a_flow_run_that_failed_behind_an_answer_and_is_retried_asks_again():
    from prefect import flow

    from flows.retrain import _asked

    attempts = []

    @flow(retries=3)  # a resumption counts as one
    def ask():
        attempts.append(_asked(NAME, 3, 2, {"reasons": ["accuracy 0.5 -> 0.6"]}, hours=0.05))
        if len(attempts) == 1:
            raise ConnectionError("MLflow is away")
        return attempts[-1]["approval"]["note"]

    def answers():
        for note in ("at first", "again"):
            say({"decision": "promote", "note": note})

    in_background(answers)
    assert ask() == "again"


def test_nobody_s_word_keeps_the_champion():
    from prefect import flow

    from flows.retrain import _asked

    @flow
    def ask():
        return _asked(NAME, 3, None, {"reasons": ["accuracy 0.5 -> 0.6"]}, hours=1 / 3600)

    state = ask(return_state=True)
    assert state.is_completed()
    assert state.result()["reasons"] == ["nobody approved within 0.000277778 hours"]


def test_a_training_notices_that_the_retraining_round_it_was_cancelled():
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run
    from prefect.states import Cancelling, Running

    from tasks.watch import CancelWatcher

    @flow
    def inner():
        parent = UUID(flow_run.parent_flow_run_id)
        watch = CancelWatcher(flow_run.id, flow_run.parent_flow_run_id)
        with get_client(sync_client=True) as client:
            before = watch.ask(client)
            client.set_flow_run_state(parent, Cancelling(), force=True)
            after = watch.ask(client)
            client.set_flow_run_state(parent, Running(), force=True)
        return before, after

    @flow
    def outer():
        return inner()

    assert outer() == (False, True)


def in_background(call):
    """The server's address is in the context, which threads do not inherit."""
    threading.Thread(target=contextvars.copy_context().run, args=(call,), daemon=True).start()


def say(answer, first=lambda: None):
    """Answers the form of the first flow run that waits; before that, `first` happens."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    waiting = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PAUSED"]}}})
    with get_client(sync_client=True) as client:
        while not (runs := client.read_flow_runs(flow_run_filter=waiting)):
            time.sleep(0.5)
        first()
        client.resume_flow_run(runs[0].id, run_input=answer)


def test_without_the_split_of_the_comparison_nothing_is_trained(config, tmp_path):
    from dapo.data.prepare import prepare

    made = prepare(config.data, Path(config.data.cache_dir))
    rows = pq.read_table(made / "train.parquet").to_pylist()
    source = {"kind": "folder", "path": str(tmp_path / "source")}
    (tmp_path / "source").mkdir()
    table = pa.table(
        {
            "images": [[image["bytes"] for image in row["images"]] for row in rows],
            "problem": [row["extra_info"]["question"] for row in rows],
            "answer": [row["extra_info"]["answer"] for row in rows],
        }
    )
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / "source" / f"{split}.parquet")
    two = io.override(config, {"data.source": source, "run_root": str(tmp_path / "runs")})
    with pytest.raises(DataError, match=r"on the split validation, in which .* has no rows; it has train \(64 rows\)"):
        retrain(two)
    assert not list(Path(two.run_root).glob("*/config.yaml")), "no run began"
