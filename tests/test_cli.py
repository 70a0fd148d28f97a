"""The command line: every command explains itself, and every mistake is one sentence with its remedy."""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dapo import cli
from dapo.config import io
from dapo.config.run import RunConfig
from dapo.errors import ConfigError, EngineError, EnvironmentCheckError, TrainingError
from dapo.observe.journal import Journal
from dapo.observe.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "geo3k_tiny.yaml")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *words: str) -> str:
    """Standard error of a command that must be refused, without a trace."""
    assert cli.main(words) == 2
    output = capsys.readouterr().err
    assert output.startswith("dapo: ")
    assert "Traceback" not in output
    return output


def every_command(parser: argparse.ArgumentParser, *words: str):
    yield list(words)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from every_command(below, *words, name)


@pytest.mark.parametrize("command", every_command(cli._parser("dapo")), ids=" ".join)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--help"])
    assert left.value.code == 0
    output = capsys.readouterr().out
    assert f"usage: {' '.join(['dapo', *command])} " in output
    assert len(output.splitlines()) > 5


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError, 2), (EnvironmentCheckError, 2), (TrainingError, 1), (EngineError, 1)]
)
def test_what_broke_is_distinguished_from_what_was_refused(error, code, monkeypatch, capsys):
    def ends(arguments):
        raise error("a sentence")

    monkeypatch.setattr(cli, "_plan", ends)
    assert cli.main(["plan", TINY]) == code
    assert capsys.readouterr().err == "dapo: a sentence\n"


def test_module_of_the_flow_explains_itself():
    command = [sys.executable, "-m", "flows.dapo", "--help"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert "usage: dapo run" in subprocess.run(command, capture_output=True, text=True, env=env).stdout


def test_importing_the_flow_loads_neither_torch_nor_ray():
    code = "import flows.dapo, sys; print([m for m in ('torch', 'ray', 'mlflow', 'transformers') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.rstrip().endswith("[]"), done.stderr


def test_retraining_of_no_model_is_refused_before_anything_starts(capsys):
    assert "add mlflow.registered_model=NAME" in refused(capsys, "retrain", TINY)


def test_typo_in_a_key_names_the_nearest(capsys):
    assert "unknown key train.stpes; did you mean 'steps'?" in refused(capsys, "run", TINY, "train.stpes=3")


def test_missing_configuration_names_those_that_are_there(capsys):
    output = refused(capsys, "run", str(ROOT / "configs" / "geo3k_tinny.yaml"))
    assert "no configuration file" in output
    assert "geo3k_tiny.yaml" in output


def test_override_without_a_value_says_what_it_should_look_like(capsys):
    assert "not of the form key.subkey=value" in refused(capsys, "run", TINY, "train.steps")


def test_wrong_device_names_what_is_here(capsys):
    output = refused(capsys, "run", TINY, "device=npu")
    assert re.search(r"device=npu, and this machine has: .*CPU", output)
    assert "configs/geo3k_tiny.yaml" in output
    assert not Path("runs").exists(), "nothing was begun"


def test_port_of_another_program_as_ray_address_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.settimeout(5)
        server = subprocess.Popen(
            [sys.executable, "-c", _NOT_RAY, str(taken.fileno())], pass_fds=[taken.fileno()], stdout=subprocess.DEVNULL
        )
        try:
            from dapo.errors import EnvironmentCheckError
            from dapo.runtime import cluster

            config = io.load(TINY, [f"ray.address=http://127.0.0.1:{taken.getsockname()[1]}"])
            with pytest.raises(EnvironmentCheckError, match=r"is not a Ray dashboard \(the port is taken by another"):
                cluster.connect(config)
        finally:
            server.kill()
            server.wait()


_NOT_RAY = (
    "import socket, sys; s = socket.socket(fileno=int(sys.argv[1]))\n"
    "while True:\n"
    "    c, _ = s.accept(); c.recv(4096)\n"
    "    c.sendall(b'HTTP/1.0 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello'); c.close()"
)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of two megabytes; needs the right to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(("key", "check"), [("run_root", "disk: runs"), ("data.cache_dir", "disk: cache")])
def test_full_disk_is_named_with_the_bytes_and_the_keys(small_disk, capsys, key, check):
    output = refused(capsys, "run", TINY, f"{key}={small_disk}/here")
    output = " ".join(output.split())
    assert re.search(rf"fail {check} 2 MiB free at {small_disk}, about (\d+ MiB|0\.\d GiB) needed", output)
    assert "set run_root / data.cache_dir to a larger disk" in output


def test_recipe_for_npus_fails_within_seconds_with_a_table(capsys):
    output = refused(capsys, "run", str(ROOT / "configs" / "geo3k.yaml"))
    for row in ("device", "CANN", "NPU packages", "disk: runs"):
        assert re.search(rf"^fail +{row} ", output, re.M), row
    assert "-> source /usr/local/Ascend/ascend-toolkit/set_env.sh" in output


def test_plan_prints_resolved_and_derived_numbers_and_the_verdict(capsys):
    assert cli.main(["plan", TINY, "batch.prompts_per_update=32"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"updates per step +2", output)
    assert "prompts_per_update: 32" in output
    assert re.search(r"^run geo3k-tiny-[0-9a-f]{8}$", output, re.M)
    assert re.search(r"\d+ ok", output)


def test_doctor_needs_no_configuration(capsys):
    assert cli.main(["doctor"]) == 0
    assert "packages" in capsys.readouterr().out


def make_run(root: Path, name: str) -> RunFolder:
    config = RunConfig(name=name, run_root=str(root))
    run = RunFolder.of(config)
    run.root.mkdir(parents=True)
    io.save(config, run.config)
    run.inputs.write_text(json.dumps({"data": "/data", "weights": "/weights"}))
    journal = Journal(run.journal)
    journal.append("started", 0, run_id=run.id, attempt=1, total_steps=2, derived={})
    journal.append("validation", 0, metrics={"val/accuracy": 0.5}, table="validation/step-000000.jsonl", best=True)
    journal.append("step", 1, metrics={"groups/accuracy": 0.55, "time/step": 2.0}, seconds_left=3725.0)
    return run


def test_status_lists_runs_and_says_how_one_is_doing(tmp_path, capsys):
    run = make_run(tmp_path / "runs", "one")
    assert cli.main(["status"]) == 0
    assert f"{run.id}  step 1/2  running or killed; last word 0:00 ago" in capsys.readouterr().out
    assert cli.main(["status", "one"]) == 0
    output = capsys.readouterr().out
    assert "validation at step 0: accuracy 0.500" in output
    assert "step 1/2  accuracy 0.550  reward -" in output
    assert "left 1:02:05" in output


def test_run_that_is_not_there_names_those_that_are(tmp_path, capsys):
    first, second = make_run(tmp_path / "runs", "one"), make_run(tmp_path / "runs", "once")
    output = refused(capsys, "status", "two")
    assert "no run of that name" in output
    assert {first.id, second.id} == set(output.strip().rpartition("there are: ")[2].split(", "))
    assert "several runs begin so" in refused(capsys, "report", "on")
    shutil.rmtree(tmp_path / "runs")
    assert "`dapo run configs/geo3k_tiny.yaml` makes one" in refused(capsys, "status")


def test_report_can_be_written_while_a_run_goes_on(tmp_path, capsys):
    run = make_run(tmp_path / "runs", "one")
    assert cli.main(["report", "one"]) == 0
    assert capsys.readouterr().out.strip() == str(run.report)
    assert run.report.is_file()


def test_reward_without_a_word_names_what_there_is(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["reward"])
    assert left.value.code == 2
    assert "usage: dapo reward [-h] ACTION" in capsys.readouterr().err
