"""Selective rollouts (after arXiv 2506.02177): prompts on which all responses agreed are sampled ever more rarely."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

# However often a prompt's groups agreed, it is sampled again with at least probability revisit ** this.
MOST_AGREED = 4


class SelectiveSampling:
    """Counts, per prompt, how often in a row its groups agreed.

    Args:
        chance: probability of being sampled again, per such time; 1.0: every prompt is sampled every time.
    """

    def __init__(self, chance: float) -> None:
        self.chance = chance
        self._agreed: dict[str, tuple[int, int]] = {}  # prompt id -> (agreed in a row, passed over since)

    def should_sample(self, prompt_id: str) -> bool:
        """Whether to sample a prompt now. The same history gives the same answer."""
        agreed, passed_over = self._agreed.get(prompt_id, (0, 0))
        chance = self.chance ** min(agreed, MOST_AGREED)
        if chance == 1 or random.Random(f"{prompt_id}/{agreed}/{passed_over}").random() < chance:
            return True
        self._agreed[prompt_id] = agreed, passed_over + 1
        return False

    def record(self, prompt_id: str, *, agreed: bool) -> None:
        """Count a graded group of this prompt."""
        if not agreed:
            self._agreed.pop(prompt_id, None)
        elif self.chance < 1:
            self._agreed[prompt_id] = self._agreed.get(prompt_id, (0, 0))[0] + 1, 0

    def state_dict(self) -> dict[str, list[int]]:
        return {prompt_id: list(counts) for prompt_id, counts in self._agreed.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        self._agreed = {prompt_id: (agreed, passed) for prompt_id, (agreed, passed) in state.items()}
