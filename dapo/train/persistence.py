"""Sharded state and exports of a policy, written in the background."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from dapo.model.network import Network
from dapo.train import checkpoint, export
from dapo.train.background import Background
from dapo.train.parallel import RankMesh
from dapo.train.snapshot import take


class PolicyWriter:
    """Saves, exports and loads one rank's part of a policy. All ranks make the same calls in the same order.

    Args:
        optimizer: of the network's parameters.
        moments_home: where its moments live.
        compute_dtype: of exports.
        source: folder that the model was loaded from; exports copy its tokenizer and processor files.
    """

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.AdamW,
        moments_home: torch.device,
        ranks: RankMesh,
        compute_dtype: torch.dtype,
        source: Path,
    ) -> None:
        self.network, self.optimizer, self.ranks = network, optimizer, ranks
        self.moments_home, self.compute_dtype, self.source = moments_home, compute_dtype, source
        self._saver = checkpoint.Saver(ranks)
        self._writing = Background()

    def save(self, folder: Path, updates: int) -> None:
        """Begin to write weights, optimiser state, update count and every rank's RNG; returns when they are copied."""
        state = self._saver.copy(self.network.model, self.optimizer, self.moments_home, updates)
        self._writing.start(partial(self._saver.write, folder, state), "checkpoint")

    def export(self, folder: Path) -> None:
        """Begin to write a Hugging Face folder and to compare it; returns when rank 0 has its weights in memory."""
        snapshot = take(self.network, self.compute_dtype, self.ranks)
        if snapshot is not None:
            self._writing.start(partial(export.write, folder, self.source, snapshot), "export")

    def written(self, *, wait: bool) -> bool:
        """Whether everything begun is on disk and compared; if so, it is forgotten.

        Raises:
            CheckpointError: it could not be written or is not what was trained; the folders are of no use.
        """
        if self._writing.busy and not wait:
            return False
        self._writing.finish()
        return True

    def load(self, folder: Path) -> int:
        """What `save` wrote, whatever number of ranks wrote it; returns the update count.

        Raises:
            CheckpointError: not a whole checkpoint of this model, or one that is being written could not be.
        """
        self._writing.finish()
        return checkpoint.load(folder, self.network.model, self.optimizer, self.moments_home, self.ranks)
