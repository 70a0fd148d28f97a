"""The training job: `python -m dapo.runtime.job RUN_FOLDER`, run by Ray Jobs on the cluster.

Reads the run folder's configuration and inputs, writes its journal and checkpoints, and depends on nothing else: not
the flow that submitted it, nor a Prefect or MLflow server.

Exit code: 0 finished or stopped on request, 1 failed (the journal's last event says why).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

import ray

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.errors import DapoError
from dapo.observe.journal import Journal, read
from dapo.observe.run_folder import RunFolder
from dapo.plan.flops import ModelFlops
from dapo.plan.packing import CostModel

log = logging.getLogger("dapo.job")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dapo.runtime.job", description=__doc__)
    parser.add_argument("run_folder", type=Path, help="folder with config.yaml and inputs.json, as the flow made it")
    folder = RunFolder(parser.parse_args(argv).run_folder.resolve())
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(folder.job_log)],
    )
    journal = Journal(folder.journal)
    try:
        return train(folder, io.load(folder.config), journal)
    except DapoError as error:
        log.error("%s", error)
        journal.append("ended", _last_step(folder), status="failed", reason=str(error), error=type(error).__name__)
        return 1
    except Exception as error:
        log.error("%s", traceback.format_exc())
        reason = f"unexpected {type(error).__name__}: {error} (trace in {folder.job_log.name})"
        journal.append("ended", _last_step(folder), status="failed", reason=reason, error=type(error).__name__)
        return 1


def train(folder: RunFolder, config: RunConfig, journal: Journal) -> int:
    """Bring up workers and rewards, load the prompts meanwhile, and hand over to the controller."""
    inputs = json.loads(folder.inputs.read_text())
    data, weights = Path(inputs["data"]), Path(inputs["weights"])
    attempt = 1 + sum(event.kind == "started" for event in read(folder.journal))
    journal.append(
        "started",
        _last_step(folder),
        run_id=folder.id,
        attempt=attempt,
        total_steps=config.train.steps,
        derived=config.derived(),
    )
    journal.append("progress", _last_step(folder), phase="loading", done=0, total=config.train.steps)

    from dapo.rewards.pool import RewardPool
    from dapo.runtime.mirror import Mirror
    from dapo.runtime.ray_clients import RayEngine, RayPolicy
    from dapo.runtime.workers import Workers

    ray.init(address="auto", log_to_driver=True, logging_level=logging.WARNING)
    # After ray.init, which puts a handler of its own there.
    signal.signal(signal.SIGTERM, partial(_stop, folder))
    mirror = None
    if config.train.mirror:
        mirror = Mirror(config.train.mirror, folder, config.train.keep_checkpoints)
        mirror.restore()
    workers = Workers(config)
    loading = workers.begin(weights)

    from dapo.data.processor import PromptProcessor
    from dapo.runtime import prompts
    from dapo.runtime.controller import Controller

    processor = PromptProcessor(weights)
    training, held_out = prompts.training(config, data, processor), prompts.held_out(config, data, processor)
    with RewardPool(
        config.reward.function, workers=config.reward.workers, deadline_s=config.reward.deadline_s
    ) as rewards:
        for place in workers.ready(loading):
            log.info("worker %s", place)
        controller = Controller(
            config,
            folder,
            journal,
            RayPolicy(workers),
            RayEngine(workers),
            rewards,
            training,
            held_out,
            processor,
            cost=cost_model(weights),
            mirror=mirror,
        )
        try:
            status = controller.run()
            log.info("%s at step %d", status, controller.at.step)
        finally:
            workers.close()  # else a failed run stays for what its engines still write
    return 0


def _stop(folder: RunFolder, *_: object) -> None:
    """Stop with a checkpoint; on a second signal end at once, because a canceller waits 30 s, not more."""
    if folder.stop_request.exists():
        log.error("ended without a checkpoint: SIGTERM came before the requested stop was done")
        os._exit(1)
    folder.stop_request.write_text("the job received SIGTERM\n")


def cost_model(weights: Path) -> CostModel | None:
    """The cost that balances packs: FLOPs of the model in `weights`; None (tokens) for an unknown model family."""
    model = json.loads((weights / "config.json").read_text())
    flops = ModelFlops.of(model["model_type"], model.get("text_config", model), model.get("vision_config"))
    return CostModel.of(flops) if flops else None


def _last_step(folder: RunFolder) -> int:
    return max((event.step for event in read(folder.journal)), default=0)


if __name__ == "__main__":
    sys.exit(main())
