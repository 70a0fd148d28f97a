"""The DAPO step and the run around it, without tensors, devices or Ray.

    collect_groups -> build_train_batch -> plan_packs -> old log-probs (reference) -> updates -> sync

Generation, training and grading are behind three interfaces (`Engine`, `Policy`, `RewardPool`); unit tests run the same
controller with a small deterministic engine and policy. docs/algorithm.md derives the step from the paper.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dapo.algo.batch import build_train_batch, subtract_kl
from dapo.algo.groups import SamplingReport
from dapo.algo.health import Health
from dapo.algo.kl import KlController
from dapo.config.run import RunConfig
from dapo.errors import EngineError, RunStopped, StarvationError
from dapo.eval import results
from dapo.eval.samples_table import table_rows
from dapo.observe.journal import Journal
from dapo.observe.metrics import speed_metrics, step_metrics
from dapo.observe.run_folder import RunFolder
from dapo.plan.packing import CostModel, plan_packs
from dapo.runtime import checkpoints
from dapo.runtime.delivery import WeightDelivery
from dapo.runtime.dynamic_sampling import DynamicSampling
from dapo.runtime.generation import EngineClient, Generation, Grader, TextCodec, refuse_broken_reward
from dapo.runtime.mirror import Mirror
from dapo.train.policy import SyncedPolicy, UpdateResult
from dapo.types import Prompt, RolloutGroup

log = logging.getLogger(__name__)

STOP_S = 10.0
_BETWEEN_STEPS = ("checkpoint", "validate")


@dataclass
class Counters:
    """What a resumed run must know besides weights, sampling and health."""

    step: int = 0
    policy_version: int = 0
    best_accuracy: float = -1.0
    """Of all validations."""


class Controller:
    """One run, from its newest checkpoint (or its beginning) to its configured end."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        journal: Journal,
        policy: SyncedPolicy,
        engine: EngineClient,
        rewards: Grader,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
        text: TextCodec,
        cost: CostModel | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.config, self.folder, self.journal, self.cost = config, folder, journal, cost
        self.mirror = mirror
        self.policy, self.engine = policy, engine
        self.held_out = held_out
        self.generation = Generation(config, engine, rewards, text, restart=self.restart_engine, phase=self.phase)
        self.sampling = DynamicSampling(config, prompts, self.generation, between_rounds=self.stop_if_asked)
        self.delivery = WeightDelivery(
            config, journal, policy, engine, held_out, lambda: self.generation.training(self.sampling.serial)
        )
        self.health = Health(config.algorithm.alarms)
        self.kl = KlController(config.algorithm.kl)
        self.checkpoints = checkpoints.Checkpoints(
            folder, journal, policy, config.train.keep_checkpoints, whole=self.put_on_mirror
        )
        self.at = Counters()
        self.seconds: dict[str, float] = defaultdict(float)
        self._recent: list[float] = []
        self._validated: tuple[int, dict[str, float]] = (-1, {})

    def run(self) -> str:
        """Train to the end; returns `finished` or `stopped`."""
        train = self.config.train
        try:
            self.resume()
            self.sync()
            if self.at.step == 0 and self.config.validation.before_training:
                self.validate()
            while self.at.step < train.steps and not self.sampling.exhausted(self.at.policy_version):
                self.stop_if_asked()
                self.checkpoints.poll()
                self.step()
                last = self.at.step == train.steps or self.sampling.exhausted(self.at.policy_version)
                if last or _due(self.at.step, train.test_freq):
                    self.validate()
                if last or _due(self.at.step, train.save_freq) or self.checkpoints.retry_due:
                    self.checkpoint()
            self.checkpoints.finish()
        except RunStopped as stop:
            if self.at.step:
                self.checkpoint()
            self.checkpoints.finish()
            self.tell_mirror(last=True)
            self.journal.append("ended", self.at.step, status="stopped", reason=str(stop))
            return "stopped"
        except Exception:
            self.checkpoints.poll(wait=True)  # what is being written may still become whole
            raise
        self.tell_mirror(last=True)
        self.journal.append("ended", self.at.step, status="finished", reason=f"step {self.at.step} of {train.steps}")
        return "finished"

    def step(self) -> None:
        """One step of DAPO (algorithm 1 of the paper, lines 3 to 12)."""
        started = time.perf_counter()
        between = {name: self.seconds[name] for name in _BETWEEN_STEPS if name in self.seconds}
        self.seconds.clear()
        at = self.at
        groups, sampled = self.collect_groups()
        if self.config.rollout.ahead and at.step + 1 < self.config.train.steps:
            self.sampling.begin_next(at.policy_version + 1)
        build = partial(
            build_train_batch,
            config=self.config.algorithm,
            prompts_per_update=self.config.batch.prompts_per_update,
            policy_version=at.policy_version,
        )
        batch = build(groups)
        plan = plan_packs(
            batch,
            ranks=self.config.data_parallel,
            tokens_per_pack=self.config.batch.tokens_per_pack,
            cost=self.cost,
        )
        slept = self.delivery.sleep(at.step)
        with self.phase("logprobs"):
            old = self.policy.old_logprobs(batch, plan)
            kl = 0.0
            if self.config.algorithm.kl.needs_reference:
                reference = self.policy.reference_logprobs(batch, plan)
                if self.config.algorithm.kl.reward_coef:
                    groups, kl = subtract_kl(
                        groups, old.values, reference.values, self.kl.coef, self.config.algorithm.kl.kind
                    )
                    batch = build(groups)
        updates: list[UpdateResult] = []
        for index in range(len(batch.updates)):
            with self.phase("update", index, len(batch.updates)):
                updates.append(self.policy.update(batch, plan, index))
        self.kl.update(kl, sum(len(g.rollouts) for g in groups))
        if self.config.rollout.ahead:
            self.settle()
        at.step += 1
        at.policy_version += 1
        sync = self.sync()
        metrics = step_metrics(groups, [u.metrics for u in updates], sampled, self.sampling.responses)
        seconds = dict(self.seconds) | {"step": time.perf_counter() - started}
        speed = speed_metrics(groups, seconds, self.config.devices)
        state = {
            "train/kl_coef": self.kl.coef,
            "groups/unfinished": len(self.generation.open),
            "outcomes/workers_replaced": self.generation.rewards.replaced,
            "engine/restarts": self.delivery.restarts,
        }
        self.finish_step(metrics | slept | sync | speed | state, seconds | between)

    def collect_groups(self) -> tuple[list[RolloutGroup], SamplingReport]:
        """Dynamic sampling (section 3.2): generate rounds until enough groups carry signal."""
        try:
            return self.sampling.collect(self.at.policy_version)
        except StarvationError as starved:
            self.journal.append("alarm", self.at.step, name="starvation", message=str(starved))
            raise RunStopped(str(starved)) from starved

    def settle(self) -> None:
        """Wait for generation ahead to end; an engine that died meanwhile gets its weights from the step's sync."""
        with self.phase("wait_for_engine"):
            try:
                self.sampling.settle()
            except EngineError as error:
                self.delivery.restart(self.at.step, error)

    def sync(self) -> dict[str, float]:
        """Engine gets the weights, and proves it."""
        with self.phase("sync"):
            return self.delivery.deliver(self.at.step, self.at.policy_version)

    def restart_engine(self, error: EngineError) -> None:
        self.delivery.restart(self.at.step, error)
        self.sync()

    def validate(self) -> None:
        """Measure the policy on the held-out prompts."""
        groups = self.generation.validation_groups(self.held_out)
        refuse_broken_reward(groups, self.config)
        verdicts = results.of_groups(groups)
        metrics = results.val_metrics(verdicts)
        table = self.folder.validation_table(self.at.step)
        table.parent.mkdir(parents=True, exist_ok=True)
        rows = table_rows(groups, self.config.validation.table_rows)
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.folder.validation_results(self.at.step).write_text(results.to_lines(verdicts))
        relative = str(table.relative_to(self.folder.root))
        best = metrics["val/accuracy"] > self.at.best_accuracy
        self.at.best_accuracy = max(metrics["val/accuracy"], self.at.best_accuracy)
        self.journal.append("validation", self.at.step, metrics=metrics, table=relative, best=best)
        self._validated = (self.at.step, metrics)

    def checkpoint(self) -> None:
        """Save everything a resumed run needs, and the weights as a Hugging Face folder; waits for the copy only."""
        metrics = self._validated[1] if self._validated[0] == self.at.step else {}
        with self.phase("checkpoint"):
            self.checkpoints.begin(self.at.step, self.state_dict(), metrics)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, where there is one and the configuration allows it."""
        path = None
        if self.config.train.resume == "auto":
            path = checkpoints.newest(self.folder, lambda text: log.warning("%s", text))
        if path is not None:
            with self.phase("loading"):
                self.policy.load(path / "state")
            self.load_state_dict(checkpoints.controller_state(path))
            self.checkpoints.resumed(path)
            log.info("resumed from %s", path)

    def state_dict(self) -> dict[str, Any]:
        return {
            "counters": dataclasses.asdict(self.at),
            "sampling": self.sampling.state_dict(),
            "health": self.health.state_dict(),
            "kl": self.kl.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = Counters(**state["counters"])
        self.sampling.load_state_dict(state["sampling"])
        self.health.load_state_dict(state["health"])
        self.kl.load_state_dict(state["kl"])

    def finish_step(self, metrics: dict[str, float], seconds: dict[str, float]) -> None:
        self._recent = [*self._recent[-9:], seconds["step"]]
        left = (self.config.train.steps - self.at.step) * sum(self._recent) / len(self._recent)
        timed = {f"time/{name}": value for name, value in seconds.items()}
        self.journal.append("step", self.at.step, metrics=metrics | timed, seconds_left=left)
        for alarm in self.health.observe(self.at.step, metrics):
            self.journal.append("alarm", self.at.step, name=alarm.name, message=alarm.message)
        self.tell_mirror()

    def put_on_mirror(self, path: Path) -> None:
        if self.mirror is not None:
            self.mirror.put(path)

    def tell_mirror(self, last: bool = False) -> None:
        """Failed uploads raise alarms; the last ones are waited for, but not long where a stop was requested."""
        if self.mirror is None:
            return
        if last:
            self.mirror.finish(STOP_S if self.folder.stop_request.exists() else None)
        for problem in self.mirror.problems():
            self.journal.append("alarm", self.at.step, name="mirror", message=problem)

    def stop_if_asked(self) -> None:
        if self.folder.stop_request.exists():
            raise RunStopped(
                f"{self.folder.stop_request.name} was found: {self.folder.stop_request.read_text().strip()}"
            )

    @contextmanager
    def phase(self, name: str, done: int = 0, total: int = 0) -> Iterator[None]:
        """Time a phase and write to the journal that it began."""
        self.journal.append("progress", self.at.step, phase=name, done=done, total=total)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
