"""The journal: append-only, exactly once per step, readable while it is written and after a crash."""

import json

from dapo.config import io
from dapo.observe.journal import Journal, follow, read
from dapo.observe.run_folder import RunFolder, run_id


def test_a_redone_step_is_not_written_twice(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    assert journal.append("step", 1, metrics={"a": 1.0})
    again = Journal(path)  # the job was killed and started again
    assert not again.append("step", 1, metrics={"a": 2.0})
    assert again.append("checkpoint", 1, path="x")
    assert [(e.kind, e.step) for e in read(path)] == [("step", 1), ("checkpoint", 1)]
    assert next(read(path)).data["metrics"] == {"a": 1.0}


def test_half_a_line_left_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).append("step", 1, metrics={})
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 2, "da')
    assert [e.step for e in read(path)] == [1]
    Journal(path).append("step", 2, metrics={})
    assert [e.step for e in read(path)] == [1, 2]


def test_a_reader_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("progress", 0, phase="generate", done=0, total=4)
    [(first, offset)] = follow(path)
    assert first.data["phase"] == "generate"
    journal.append("alarm", 0, name="x", message="y")
    assert [event.kind for event, _ in follow(path, offset)] == ["alarm"]


def test_lines_of_others_are_skipped(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text("not json\n" + json.dumps([1]) + "\n" + json.dumps({"kind": "step"}) + "\n")
    assert list(read(path)) == []


def test_the_run_id_follows_what_is_learned_and_nothing_else():
    base = io.validate({})
    assert run_id(base) == run_id(io.validate({"train": {"steps": 999}, "mlflow": {"experiment": "other"}}))
    assert run_id(base) != run_id(io.validate({"seed": 1}))
    assert run_id(base) != run_id(io.validate({"model": {"optimizer": {"lr": 2e-6}}}))
    assert RunFolder.of(base).id == run_id(base)
