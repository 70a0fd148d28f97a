"""Dynamic sampling (DAPO section 3.2) of one run: prompts in their order, rounds until a step is full, now or ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dapo.algo.groups import GroupBuffer, SamplingReport
from dapo.config.run import RunConfig
from dapo.data.loader import PromptLoader
from dapo.errors import EngineError, RunStopped
from dapo.runtime.generation import Generation
from dapo.types import Prompt, RolloutGroup


class DynamicSampling:
    """Fills steps with groups that carry signal.

    Args:
        between_rounds: called after each round; may raise `RunStopped`.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        generation: Generation,
        between_rounds: Callable[[], None] = lambda: None,
    ) -> None:
        self.prompts, self.generation = prompts, generation
        self.loader = PromptLoader(len(prompts), config.seed, config.train.epochs)
        self.buffer = GroupBuffer(
            config.algorithm.sampling, config.batch.prompts_per_step, config.batch.prompts_per_round
        )
        self.serial = 0
        """Of the next group."""
        self.responses = 0
        """Responses generated for training so far, whether they were trained on or not."""
        self._finish_share = config.rollout.finish_share
        self._between_rounds = between_rounds
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._ahead: Future[None] | None = None
        self._filled = False
        self._interrupted = False
        """A step's filling was begun and not ended."""
        self._postponed: list[int] = []

    def exhausted(self, version: int) -> bool:
        """All epochs are used up, and the waiting groups do not fill a step that trains policy version `version`."""
        return self._no_more_prompts and not self._filled and self.buffer.fresh(version) < self.buffer.prompts_per_step

    @property
    def _no_more_prompts(self) -> bool:
        return self.loader.exhausted and not self._postponed

    def collect(self, version: int) -> tuple[list[RolloutGroup], SamplingReport]:
        """One step's groups, and how they were found.

        Args:
            version: policy version that will be trained on them; it decides what is too old.

        Raises:
            StarvationError: see `GroupBuffer.take`.
        """
        if not self._filled:
            self._fill(version, restart=True)
        self._filled = self._interrupted = False
        return self.buffer.take(), self.buffer.report()

    def begin_next(self, version: int) -> None:
        """One-step-off-policy (`rollout.ahead`): write the next step's groups while this step trains. Until `settle`
        everything here belongs to the generating thread.

        Args:
            version: policy version that will be trained on them: one more than the engine's.
        """
        if self.exhausted(version):
            return
        # A restarted engine needs the trainer's weights, and the trainer is at work: `settle` reports a dead one.
        self._ahead = self._thread.submit(self._fill, version, restart=False)

    def settle(self) -> None:
        """Wait for generation ahead to end: nothing may be generated while the engine's weights change.

        A run that is to stop ends it after the current round; `collect` would continue with the missing groups.

        Raises:
            EngineError: the engine died meanwhile. Its finished responses are kept; `collect` requests the rest again.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        try:
            ahead.result()
            self._filled = True
        except RunStopped:
            self._interrupted = True
        except EngineError:
            self._interrupted = True
            raise

    def _fill(self, version: int, *, restart: bool) -> None:
        if not self._interrupted:
            self.buffer.begin_step(version)
        while (size := self.buffer.next_round_size()) > 0:
            # As many groups as are to end; those left unfinished are asked again first.
            new = math.ceil(size / self._finish_share) - len(self.generation.open) - len(self._postponed)
            offered = [*self._postponed, *self.loader.take(max(new, 0))]
            # At the turn of an epoch a prompt may come again while it is still being answered: it waits.
            answering = {group.prompt.id for group in self.generation.open}
            self._postponed = [i for i in offered if self.prompts[i].id in answering]
            free = [p for i in offered if (p := self.prompts[i]).id not in answering]
            asked = [p for p in free if self.buffer.should_sample(p.id)]
            if not asked and not self.generation.open:
                if self._no_more_prompts:
                    break
                continue
            # Each round has a serial of its own, also one without new prompts: its random streams hang on it.
            serial, self.serial = self.serial, self.serial + max(len(asked), 1)
            last = self._no_more_prompts
            groups = self.generation.training_groups(asked, version, serial, last=last, restart=restart)
            self.responses += sum(len(g.rollouts) for g in groups)
            self.buffer.add(groups)
            self._between_rounds()

    def state_dict(self) -> dict[str, Any]:
        return {
            "loader": self.loader.state_dict(),
            "buffer": self.buffer.state_dict(),
            "open": self.generation.state_dict(),
            "serial": self.serial,
            "responses": self.responses,
            "filled": self._filled,
            "postponed": self._postponed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self.buffer.load_state_dict(state["buffer"])
        self.generation.load_state_dict(state["open"])
        self.serial, self.responses, self._filled = state["serial"], state["responses"], state["filled"]
        self._postponed = state["postponed"]
