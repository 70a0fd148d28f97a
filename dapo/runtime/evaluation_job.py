"""The process that measures: `python -m dapo.runtime.evaluation_job FOLDER`, started by `dapo.runtime.evaluation`.

One device: the engine lives in this process. Several, or a cluster at an address: the training's workers generate, as
they do in validation. A killed evaluation continues after the last prompts it saved.

Exit code: 0 measured, 1 failed (error.json says why).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.errors import DapoError, EngineError
from dapo.eval import results
from dapo.eval.evaluate import EvaluationFolder, measure
from dapo.eval.page import write_evaluation
from dapo.files import write_whole
from dapo.runtime.evaluation import on_ray
from dapo.runtime.generation import Generation, StreamingEngine, refuse_broken_reward
from dapo.serialize import group_from_plain, group_to_plain
from dapo.types import Prompt, RolloutGroup

log = logging.getLogger("dapo.evaluation")

_SEQUENCES_AHEAD = 4
"""A round asks for so many times the sequences decoded together: enough to keep the engine full."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dapo.runtime.evaluation_job", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with config.yaml and inputs.json, as `dapo evaluate` made it")
    folder = EvaluationFolder(parser.parse_args(argv).folder.resolve())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run(folder, io.load(folder.config))
        return 0
    except DapoError as error:
        log.error("%s", error)
        _fail(folder, type(error).__name__, str(error))
    except Exception as error:
        log.error("%s", traceback.format_exc())
        _fail(folder, "EngineError", f"unexpected {type(error).__name__}: {error} (trace in {folder.log})")
    return 1


def run(folder: EvaluationFolder, config: RunConfig) -> None:
    """Answer every held-out prompt, grade the answers, write results, metrics and the page."""
    from dapo import torchvision_cpu

    torchvision_cpu.install()
    from dapo.data.processor import PromptProcessor
    from dapo.rewards.pool import RewardPool
    from dapo.runtime.prompts import held_out

    started = time.monotonic()
    inputs = folder.read_inputs()
    weights = Path(inputs["weights"])
    processor = PromptProcessor(weights)
    prompts = held_out(config, Path(inputs["data"]), processor)
    _tell(folder, 0, len(prompts))
    done = _kept(folder, prompts, config.validation.samples)
    if done:
        log.info("%d of %d prompts were answered before", len(done), len(prompts))
    size = max(1, _SEQUENCES_AHEAD * config.rollout.max_num_seqs // config.validation.samples)
    with (
        _engine(config, weights, processor) as engine,
        RewardPool(
            config.reward.function, workers=config.reward.workers, deadline_s=config.reward.deadline_s
        ) as rewards,
        folder.answers.open("a") as answers,
    ):
        generation = Generation(config, engine, rewards, processor, restart=_give_up, phase=lambda _: nullcontext())
        left = [p for p in prompts if p.id not in done]
        for begin in range(0, len(left), size):
            for group in generation.validation_groups(left[begin : begin + size]):
                done[group.prompt.id] = group
                answers.write(json.dumps(_without_images(group)) + "\n")
            answers.flush()
            _tell(folder, len(done), len(prompts))
    groups = [done[p.id] for p in prompts]
    refuse_broken_reward(groups, config)
    measured = measure(groups, time.monotonic() - started)
    folder.results.write_text(results.to_lines(results.of_groups(groups)))
    write_evaluation(folder.page, config, inputs, measured, groups)
    write_whole(folder.metrics, json.dumps(measured, indent=1))


@contextmanager
def _engine(config: RunConfig, weights: Path, processor: Any) -> Iterator[StreamingEngine]:
    """The engine in this process, or the workers of a cluster."""
    if not on_ray(config):
        from dapo import device
        from dapo.rollout.factory import make_engine

        engine = make_engine(config, weights, processor, device.torch_device(device.resolve(config.device)))
        yield engine
        engine.close()
        return
    import ray

    from dapo.runtime.ray_clients import RayEngine
    from dapo.runtime.workers import Workers

    ray.init(address="auto", log_to_driver=True, logging_level=logging.WARNING)
    workers = Workers(config)
    for place in workers.ready(workers.begin(weights)):
        log.info("worker %s", place)
    try:
        yield RayEngine(workers)
    finally:
        workers.close()


def _give_up(error: EngineError) -> None:
    """The answers so far are in the folder: the next attempt continues after them."""
    raise error


def _kept(folder: EvaluationFolder, prompts: Sequence[Prompt], samples: int) -> dict[str, RolloutGroup]:
    """Groups that an earlier attempt saved whole; an incomplete last line is removed."""
    if not folder.answers.exists():
        return {}
    content = folder.answers.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        folder.answers.write_bytes(whole)
    asked = {p.id: p for p in prompts}
    found = {}
    for line in whole.splitlines():
        group = group_from_plain(json.loads(line))
        # A check that failed gets another chance.
        if group.prompt.id in asked and len(group.rollouts) == samples and not any(r.failed for r in group.rollouts):
            found[group.prompt.id] = replace(group, prompt=asked[group.prompt.id])
    return found


def _without_images(group: RolloutGroup) -> dict[str, Any]:
    """The prompt is in the data, and log-probabilities are of no use here: both are most of the bytes."""
    rollouts = tuple(replace(r, completion=replace(r.completion, logprobs=())) for r in group.rollouts)
    return group_to_plain(replace(group, prompt=replace(group.prompt, images=(), token_ids=()), rollouts=rollouts))


def _tell(folder: EvaluationFolder, done: int, total: int) -> None:
    write_whole(folder.progress, json.dumps({"done": done, "total": total}))


def _fail(folder: EvaluationFolder, kind: str, message: str) -> None:
    write_whole(folder.error, json.dumps({"error": kind, "message": message}))


if __name__ == "__main__":
    sys.exit(main())
