"""A stand-in for the training job: writes a journal the way `dapo.runtime.job` does, without a model.

`python standin_job.py RUN_FOLDER`; behaviour by environment variables (they come through `ray.env`):
    STANDIN_SECONDS    per step
    STANDIN_DIE_AT     SIGKILL itself at this step, in the first attempt
    STANDIN_FAIL_AT    end as failed at this step
    STANDIN_ERROR      with this error; RewardError, which lasts, where nothing is said
    STANDIN_STARVE_AT  stop by itself before this step, with a checkpoint
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from dapo.config import io
from dapo.observe.journal import Journal, read
from dapo.observe.run_folder import RunFolder


def main() -> int:
    run = RunFolder(Path(sys.argv[1]))
    config = io.load(run.config)
    inputs = json.loads(run.inputs.read_text())
    assert Path(inputs["data"]).is_dir()
    assert Path(inputs["weights"]).is_dir()
    journal = Journal(run.journal)
    attempt = 1 + sum(e.kind == "started" for e in read(run.journal))
    first = max((e.step for e in read(run.journal) if e.kind == "checkpoint"), default=0)
    steps = config.train.steps
    journal.append(
        "started",
        first,
        run_id=run.id,
        attempt=attempt,
        total_steps=steps,
        derived=config.derived(),
    )
    sys.stdout.write(f"stand-in job, attempt {attempt}\n")
    if first == 0:
        validate(journal, run, 0)
    for step in range(first + 1, steps + 1):
        if run.stop_request.exists():
            save(journal, run, step - 1)
            journal.append("ended", step - 1, status="stopped", reason=run.stop_request.read_text().strip())
            return 0
        if step == int(os.environ.get("STANDIN_STARVE_AT", "-1")):
            save(journal, run, step - 1)
            journal.append("ended", step - 1, status="stopped", reason="dynamic sampling found nothing")
            return 0
        journal.append("progress", step, phase="generate", done=0, total=1)
        time.sleep(float(os.environ.get("STANDIN_SECONDS", "0")))
        if attempt == 1 and step == int(os.environ.get("STANDIN_DIE_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == int(os.environ.get("STANDIN_FAIL_AT", "-1")):
            error = os.environ.get("STANDIN_ERROR", "RewardError")
            journal.append("ended", step, status="failed", reason="the reward function is broken", error=error)
            return 1
        metrics = {
            "reward/mean": 0.1 * step,
            "reward/accuracy": 0.6 + 0.01 * step,
            "train/entropy": 1.0 / step,
            "response/length_mean": 30.0,
            "groups/kept": 40,
            "groups/generated": 64,
            "groups/accuracy": 0.5,
            "time/step": 0.1,
        }
        journal.append("step", step, metrics=metrics, seconds_left=float(steps - step))
        if step % config.train.test_freq == 0 or step == steps:
            validate(journal, run, step)
        if step % config.train.save_freq == 0 or step == steps:
            save(journal, run, step)
    journal.append("ended", steps, status="finished", reason=f"step {steps} of {steps}")
    return 0


def validate(journal: Journal, run: RunFolder, step: int) -> None:
    table = run.validation_table(step)
    table.parent.mkdir(exist_ok=True)
    row = {"id": "test/0", "question": "a=3 b=4 area?", "answer": "12", "response": "\\boxed{12}", "extracted": "12"}
    row |= {"accuracy": True, "format": 1.0, "tokens": 9, "truncated": False, "images": [], "tags": []}
    table.write_text(json.dumps(row) + "\n")
    metrics = {"val/accuracy": 0.6 + 0.02 * step, "val/format": 1.0, "val/response_length": 30.0}
    journal.append("validation", step, metrics=metrics, table=str(table.relative_to(run.root)), best=True)


def save(journal: Journal, run: RunFolder, step: int) -> None:
    (run.checkpoint(step) / "hf").mkdir(parents=True, exist_ok=True)
    path = str(run.checkpoint(step).relative_to(run.root))
    journal.append("checkpoint", step, path=path, metrics={"val/accuracy": 0.6 + 0.02 * step}, best=True, seconds=0.1)


if __name__ == "__main__":
    sys.exit(main())
