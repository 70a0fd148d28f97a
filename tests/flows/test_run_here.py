"""`dapo run` as people start it, in a process of its own: what it prints, and that nothing is left running."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dapo.observe.journal import read
from dapo.runtime import cluster, processes
from tests.flows.conftest import HERE, standin_tree

ROOT = HERE.parents[1]


LOOKUPS = """
import os, socket, sys
_real = socket.getaddrinfo
def getaddrinfo(host, *rest, **more):
    with open(os.environ["LOOKUPS"], "a") as file:
        file.write(f"{host} {sys.argv[:3]}\\n")
    return _real(host, *rest, **more)
socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Away from the other tests' Ray: these runs start and end their own."""
    return tmp_path_factory.mktemp("run_here")


class Started:
    """A `dapo run` of our own; everything it starts carries a mark in its environment."""

    def __init__(self, root: Path, name: str, *overrides: str, **env: str) -> None:
        config = root / f"{name}.yaml"
        config.write_text(yaml.safe_dump(standin_tree(root, name, **env)))
        self.mark = f"dapo-test-{name}-{time.time_ns()}"
        self.output = root / f"{name}.out"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_", "MLFLOW_"))}
        # Python imports this module of ours by itself, in every process that the run starts.
        (root / "hooks").mkdir(exist_ok=True)
        (root / "hooks" / "sitecustomize.py").write_text(LOOKUPS)
        self.lookups = root / f"{name}.lookups"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "run_standin.py"), "run", str(config), *overrides],
                # Not the repository: its prefect.toml names a server that may really run.
                cwd=root,
                env={
                    **clean,
                    "MARK": self.mark,
                    "LOOKUPS": str(self.lookups),
                    "PYTHONPATH": f"{root / 'hooks'}:{ROOT}",
                    "PREFECT_HOME": str(root / "home"),
                },
                stdout=out,
                stderr=out,
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, words: str, within_s: float = 120.0) -> None:
        end_at = time.monotonic() + within_s
        while words not in self.text:
            assert self.process.poll() is None, f"ended before it said {words!r}:\n{self.text}"
            assert time.monotonic() < end_at, f"did not say {words!r} within {within_s:.0f} s:\n{self.text}"
            time.sleep(0.1)

    def left_over(self) -> list[processes.Process]:
        return [p for p in processes.family(self.mark) if p.pid != self.process.pid]


def journal(root: Path, name: str):
    (path,) = (root / "runs").glob(f"{name}-*/journal.jsonl")
    return list(read(path))


def test_run_shows_progress_and_leaves_nothing_running(place):
    run = Started(place, "shown")
    assert run.process.wait(180) == 0, run.text
    assert run.left_over() == []
    for pattern in (
        r"folder .*/runs/shown-",
        r"environment: done",
        r"step 4/4 .*accuracy 0\.\d+ .*reward 0\.400 .*entropy 0\.250 .*length 30\.0 .*kept 40/64 .*s  left 0:00",
        r"validation at step 4: accuracy 0\.680",
        r"Held-out accuracy: 0\.600 at step 0, 0\.680 at step 4",
        r"report: +/.*report\.html",
        r"checkpoint: +/.*step-000004",
        r"MLflow: +sqlite:///",
    ):
        assert re.search(pattern, run.text), f"{pattern} in\n{run.text}"
    assert "Traceback" not in run.text
    assert not (place / "home").exists(), "the user's Prefect home is not touched"
    asked = {line.split()[0] for line in run.lookups.read_text().splitlines()}
    # Ray's dashboard asks which cloud it is in; the question does not leave the link, and cannot be switched off.
    clouds = {"169.254.169.254", "metadata.google.internal"}
    assert asked - clouds <= {"127.0.0.1", "localhost", "None", socket.gethostname()}, "nothing phones home"


def test_ctrl_c_saves_a_checkpoint_and_leaves_nothing_running(place):
    run = Started(place, "interrupted", "train.steps=500", STANDIN_SECONDS="0.2")
    run.wait_for("step   3/500")
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(90) == 130, run.text
    assert run.left_over() == []
    last = journal(place, "interrupted")[-1]
    assert last.data == {"status": "stopped", "reason": "interrupted by the user"}
    assert "the same command goes on from the last checkpoint" in run.text


@pytest.mark.slow
def test_ctrl_c_before_training_leaves_nothing_running(place):
    run = Started(place, "early", "model.source.warmup_steps=5000")
    run.wait_for("weights: ")
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(60) == 130, run.text
    assert run.left_over() == []


@pytest.mark.nightly
@pytest.mark.slow
def test_training_survives_a_killed_run_and_the_next_one_takes_it_over(place):
    run = Started(place, "survivor", "train.steps=40", STANDIN_SECONDS="0.5")
    run.wait_for("step  2/40")
    run.process.kill()
    run.process.wait()
    time.sleep(6)
    left = " ".join(Path(f"/proc/{p.pid}/cmdline").read_text() for p in run.left_over())
    assert "standin_job.py" in left, "training goes on"
    assert "uvicorn" not in left, "the temporary Prefect server ends with its run"
    second = Started(place, "survivor", "train.steps=40", STANDIN_SECONDS="0.5")
    assert second.process.wait(180) == 0, second.text
    assert [e.data["attempt"] for e in journal(place, "survivor") if e.kind == "started"] == [1]
    assert run.left_over() == []
    assert second.left_over() == []


def test_unexpected_error_is_one_sentence_and_the_place_of_the_trace(place):
    folder = place / "not-writable"
    folder.mkdir()
    (folder / ".prefect").write_text("a file where a folder should be")
    run = Started(place, "unexpected", f"run_root={folder}")
    assert run.process.wait(60) == 1
    assert "Traceback" not in run.text
    found = re.search(r"dapo: unexpected FileExistsError: .* Trace in (\S+)", run.text)
    assert found, run.text
    assert "Traceback" in Path(found[1]).read_text()
    assert run.left_over() == []


@pytest.mark.slow
def test_a_training_that_failed_is_no_refusal(place):
    run = Started(place, "broken", STANDIN_FAIL_AT="2")
    assert run.process.wait(180) == 1, run.text
    assert "dapo: training failed: the reward function is broken. Log: " in run.text
    assert run.left_over() == []


def test_head_of_a_run_is_not_found_by_others(place, tmp_path):
    from dapo.config import io

    assert cluster.find_local(io.validate(standin_tree(tmp_path, "other"))) is None
