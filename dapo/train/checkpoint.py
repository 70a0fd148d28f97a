"""Sharded training state through torch.distributed.checkpoint: written by all ranks, read by any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from dapo.errors import CheckpointError
from dapo.train import optim
from dapo.train.parallel import RankMesh

_FAILURES = (Exception, CheckpointException)  # the latter is a BaseException


class Saver:
    """Copies states to host memory and writes the copies; training may go on while one is written.

    Collective: every rank makes the same calls in the same order.
    """

    def __init__(self, ranks: RankMesh) -> None:
        self._ranks = ranks
        self._group: Any = None

    def copy(
        self, model: nn.Module, optimizer: torch.optim.AdamW, moments_home: torch.device, updates: int
    ) -> dict[str, Any]:
        """Weights, moments, update count and this rank's RNG, in host memory."""
        optim.make_state(optimizer, moments_home)  # a run whose updates were all skipped has none yet
        if self._ranks.mesh is not None and self._group is None:
            # Its collectives run beside the training's, so they need a group of their own.
            self._group = dist.new_group(backend="gloo")
        state = _state(model, optimizer) | {"updates": torch.tensor(updates)} | _rng_state(self._ranks)
        # Not by DTensor.from_local: that would move the copy to the mesh's device again.
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}

    def write(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a copy; in any thread.

        Raises:
            CheckpointError: the folder cannot be written (for example a full disk); it is then not a checkpoint.
        """
        try:
            with _quiet():
                dcp.save(state, checkpoint_id=str(folder), process_group=self._group, no_dist=self._ranks.mesh is None)
        except _FAILURES as error:
            raise CheckpointError(f"the state could not be written to {folder}: {_first_cause(error)}") from error


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, moments_home: torch.device, ranks: RankMesh
) -> int:
    """Read it all into place; returns the update count.

    A rank that did not exist when the state was written keeps its own RNG.

    Raises:
        CheckpointError: not a checkpoint or of another model (then nothing was changed), or damaged (then part of it
            may have been read already: load another one before going on).
    """
    try:
        metadata = dcp.FileSystemReader(str(folder)).read_metadata()
    except _FAILURES as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {_first_cause(error)}") from error
    found = metadata.state_dict_metadata
    optim.make_state(optimizer, moments_home)
    updates = torch.tensor(0)
    state = _state(model, optimizer) | {"updates": updates}
    state |= {name: tensor for name, tensor in _rng_state(ranks).items() if name in found}
    for name, tensor in state.items():
        size = tuple(getattr(found.get(name), "size", ()))
        if name not in found or size != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder} does not hold this model's state: {name} is "
                + (f"{list(size)} there and {list(tensor.shape)} here" if name in found else "missing")
            )
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=str(folder), no_dist=ranks.mesh is None)
    except _FAILURES as error:
        raise CheckpointError(f"{folder} is damaged: {_first_cause(error)}") from error
    _restore_rng(state, ranks)
    return int(updates)


@contextmanager
def _quiet() -> Iterator[None]:
    """The library warns about a single process although `no_dist` is set."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def _state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Flat names to the live tensors."""
    state: dict[str, Any] = {}
    for name, parameter in _parameters(model).items():
        state[f"weights/{name}"] = parameter.detach()
        for part, tensor in optimizer.state.get(parameter, {}).items():
            state[f"optimizer/{name}/{part}"] = tensor
    return state


def _rng_state(ranks: RankMesh) -> dict[str, Tensor]:
    state = {f"rng/cpu/{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type != "cpu":
        state[f"rng/device/{ranks.rank}"] = getattr(torch, ranks.device.type).get_rng_state(ranks.device)
    return state


def _restore_rng(state: dict[str, Any], ranks: RankMesh) -> None:
    if (cpu := state.get(f"rng/cpu/{ranks.rank}")) is not None:
        torch.set_rng_state(cpu)
    if (own := state.get(f"rng/device/{ranks.rank}")) is not None:
        getattr(torch, ranks.device.type).set_rng_state(own, ranks.device)


def _first_cause(error: BaseException) -> str:
    """The reason inside the wrappers of the checkpoint library, as one line."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_first_cause(cause)}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
