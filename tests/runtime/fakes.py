"""Small deterministic stand-ins behind the controller's interfaces: a bandit that learns, and an engine that can fail.

The policy knows one number, its skill: the probability of a right answer, which every update raises. The engine answers
"right" or "wrong" by a hash of (seed, prompt, sample), so that the same seeds give the same responses.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dapo.config import io
from dapo.errors import EngineError
from dapo.observe.journal import Journal, read
from dapo.observe.run_folder import RunFolder
from dapo.rollout.engine import collected, prompts_needed
from dapo.runtime.controller import Controller
from dapo.train.policy import LogProbs, UpdateResult
from dapo.types import Completion, Finished, FinishReason, Prompt, Scored, TimedOut

STOP, RIGHT, WRONG = 0, 1, 2


def prompts(count: int, split: str = "train") -> list[Prompt]:
    return [Prompt(f"{split}/{i}", (5, 6, 7), (), (), "right", f"question {i}") for i in range(count)]


class Words:
    """Text encoder: two words."""

    stop_token_ids, banned_token_ids = (STOP,), ()

    def decode_many(self, responses):
        return ["right" if RIGHT in ids else "wrong" for ids in responses]


class Bandit:
    """`Policy` with one weight; remembers what it was asked to train on."""

    def __init__(self, skill: float = 0.5, gain: float = 0.02) -> None:
        self.skill, self.gain = skill, gain
        self.engine: ScriptedEngine | None = None
        self.trained: list[list[str]] = []

    def logprobs(self, batch, plan):
        return self.old_logprobs(batch, plan)

    def old_logprobs(self, batch, plan):
        assert len(plan.updates) == len(batch.updates)
        return LogProbs(tuple(tuple((-0.5,) * len(s.response_ids) for s in g.sequences) for g in batch.groups))

    def reference_logprobs(self, batch, plan):
        return LogProbs(tuple(tuple((-0.75,) * len(s.response_ids) for s in g.sequences) for g in batch.groups))

    def update(self, batch, plan, index):
        self.trained.append([batch.groups[g].prompt.id for g in batch.updates[index]])
        self.skill = min(self.skill + self.gain, 0.95)
        tokens = sum(len(s.response_ids) for g in batch.updates[index] for s in batch.groups[g].sequences)
        return UpdateResult({"loss": 0.0, "entropy": 1.0, "tokens": float(tokens), "grad_norm": 1.0})

    def sync(self, version):
        self.engine.skill, self.engine.version = self.skill, version
        return {"time/sync_copy": 0.0}

    def save(self, folder: Path):
        (folder / "skill.json").write_text(json.dumps(self.skill))

    def load(self, folder: Path):
        self.skill = json.loads((folder / "skill.json").read_text())

    def export(self, folder: Path):
        folder.mkdir()
        (folder / "model.txt").write_text(str(self.skill))

    def written(self, *, wait):
        return True


class ScriptedEngine:
    """Answers by hash; `fail_at` are the calls of `stream` that die."""

    def __init__(self, fail_at: tuple[int, ...] = (), stale: bool = False) -> None:
        self.skill, self.version, self.calls, self.restarts = 0.0, -1, 0, 0
        self.fail_at = fail_at
        self.logprob = -1.5 if stale else -0.5
        """Of every token; other than the policy's where the engine computes with other weights."""

    def stream(self, prompts, params, begun=()):
        self.calls += 1
        open_prompts = len(prompts)
        for index, prompt in enumerate(prompts):
            if self.calls in self.fail_at and 2 * index >= len(prompts):
                raise EngineError("the engine process died")
            ends = open_prompts > len(prompts) - prompts_needed(len(prompts), params)
            open_prompts -= ends
            for sample in range(params.n):
                before = begun[index][sample] if begun else None
                if before is None or not before.finished:
                    yield Finished(index, sample, self._written(prompt, sample, params, before, ends))

    def generate(self, prompts, params):
        return collected(self.stream(prompts, params), len(prompts), params.n)

    def _written(self, prompt, sample, params, before, ends):
        whole = self._answer(prompt, sample, params)
        if before is not None:
            rest = Completion(whole.token_ids[1:], whole.logprobs[1:], FinishReason.STOP, self.version)
            return before.continued(rest)
        if ends:
            return whole
        return Completion(whole.token_ids[:1], whole.logprobs[:1], FinishReason.UNFINISHED, self.version)

    def _answer(self, prompt, sample, params):
        digest = hashlib.sha256(f"{params.seed}/{prompt.id}/{sample}".encode()).digest()
        right = int.from_bytes(digest[:4], "big") / 2**32 < self.skill
        ids = (RIGHT if right else WRONG, STOP)
        return Completion(ids, (self.logprob,) * len(ids), FinishReason.STOP, self.version)

    def restart(self):
        self.restarts += 1

    def sleep(self): ...

    def wake(self):
        return False


class Judge:
    """Reward pool: compares text; `broken` lets every check fail."""

    replaced = 0

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def score(self, items):
        return [TimedOut(5.0) if self.broken else Scored(response == answer, 1.0) for response, answer in items]


def make(tmp_path, *, skill=0.5, engine=None, judge=None, questions=40, **tree):
    train = {"steps": 4, "test_freq": 2, "save_freq": 2, **tree.pop("train", {})}
    batch = {"prompts_per_step": 4, "prompts_per_update": 2, "group_size": 4, "max_response_tokens": 8}
    base = {"run_root": str(tmp_path), "train": train, "batch": batch, "data": {"max_prompt_tokens": 16}}
    config = io.validate(base | tree)
    folder = RunFolder.of(config)
    folder.root.mkdir(parents=True, exist_ok=True)
    policy, engine = Bandit(skill), engine or ScriptedEngine()
    policy.engine = engine
    controller = Controller(
        config,
        folder,
        Journal(folder.journal),
        policy,
        engine,
        judge or Judge(),
        prompts(questions),
        prompts(20, "test"),
        Words(),
    )
    return controller, policy, folder


def kinds(folder):
    return [(e.kind, e.step) for e in read(folder.journal) if e.kind in ("step", "validation", "checkpoint", "ended")]


def without_checkpoints(folder):
    """In order; when a checkpoint is noticed to be whole is another matter."""
    return [found for found in kinds(folder) if found[0] != "checkpoint"]
