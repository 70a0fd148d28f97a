"""The order in which prompts are seen: a function of (seed, epoch), so that two integers are the whole state."""

from __future__ import annotations

import random
from collections.abc import Mapping

from dapo.errors import DataError


class PromptLoader:
    """Hands out indices of prompts, every prompt once per epoch.

    Args:
        count: prompts.
        seed: decides the order of every epoch.
        epochs: after so many the loader is exhausted.

    Raises:
        DataError: there is nothing to hand out.
    """

    def __init__(self, count: int, seed: int, epochs: int) -> None:
        if count < 1 or epochs < 1:
            raise DataError(f"a loader over {count} prompts and {epochs} epochs has nothing to hand out")
        self.count, self.seed, self.epochs = count, seed, epochs
        self._epoch = self._position = 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; equal to `epochs` when exhausted."""
        return self._epoch

    @property
    def exhausted(self) -> bool:
        """All epochs were handed out."""
        return self._epoch >= self.epochs

    def take(self, k: int) -> list[int]:
        """The next k indices; fewer at the end of an epoch, none when exhausted.

        An epoch is not joined with the next: the same prompt could be twice in one round, and equal prompts get equal
        random streams.
        """
        if self.exhausted:
            return []
        taken = self._order[self._position : self._position + k]
        self._position += len(taken)
        if self._position == self.count:
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        return taken

    def state_dict(self) -> dict[str, int]:
        """Epoch and position in it."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where another loader over the same prompts stopped.

        Raises:
            DataError: the position is not one of this loader's: the data set has changed.
        """
        epoch, position = int(state["epoch"]), int(state["position"])
        if not (0 <= position < self.count and epoch >= 0):
            raise DataError(
                f"the saved position {position} of epoch {epoch} is not in a data set of {self.count} prompts: it is "
                "another data set than the checkpoint's; restore it or start a new run"
            )
        self._epoch, self._position = epoch, position
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(self.count))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
