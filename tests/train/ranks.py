"""Several policies in as many gloo processes, started once for many cases: starting is what takes the time."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from dapo import torchvision_cpu
from dapo.model import attention_short, attention_split
from dapo.plan.packing import plan_packs
from tests.model.tiny import TinyProcessor, exact_float64, make_batch, make_folder


@dataclass(frozen=True)
class Case:
    """A model, a configuration and a batch to train one step on."""

    kind: str = "dense"
    tree: dict[str, Any] = field(default_factory=dict)
    """Over `reference.run_config`."""
    parallel: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    save: str = ""
    """Folder below the run's folder for the state after the step."""
    load: str = ""
    """State to begin from."""
    split_attention: bool = False
    """Ragged kernels for the shortest context, too, as accelerators have them."""
    export: str = ""
    tokens_per_pack: int = 64
    share_prefix: bool = True
    dtype: torch.dtype = torch.float64
    """Of the master weights."""
    min_group_bytes: int = 0
    """0: FSDP per block, as large models have it; the default value of the code puts these models in one piece."""

    @property
    def plain(self) -> bool:
        """Plain transformers computes the same."""
        return not self.load and self.dtype == torch.float64 and "experts" not in self.batch

    def make_batch(self) -> Any:
        return make_batch(**{"images": "none" if self.kind.startswith("text") else "some"} | self.batch)

    def make_folder(self, root: Path) -> Path:
        folder = root / f"{self.kind}{'-tied' if self.tied else ''}"
        return folder if folder.exists() else make_folder(folder, self.kind, tied=self.tied)


def run_case(case: Case, folder: Path, root: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """One step on this rank; what every rank can say about it afterwards."""
    from dapo.train import parallel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "MIN_GROUP_BYTES", case.min_group_bytes)
        if case.split_attention:
            patch.setattr(attention_split, "MAX_CONTEXT", 0)
            patch.delattr(attention_short, "attend")  # an error where it is still called
        return _run_case(case, folder, root, rank, world)


def _run_case(case: Case, folder: Path, root: Path, rank: int, world: int) -> dict[str, Any]:
    from dapo.train.fsdp_policy import FsdpPolicy
    from tests.train.reference import run_config

    config = run_config(case.tree, world_size=world, **case.parallel)
    policy = FsdpPolicy(config, folder, TinyProcessor(case.kind, case.dtype), rank, world, master_dtype=case.dtype)
    if case.load:
        policy.load(root / case.load)
    batch = case.make_batch()
    plan = plan_packs(
        batch, ranks=config.data_parallel, tokens_per_pack=case.tokens_per_pack, share_prefix=case.share_prefix
    )
    with exact_float64() if case.dtype == torch.float64 else contextlib.nullcontext():
        old = policy.old_logprobs(batch, plan)
        updates = [policy.update(batch, plan, u).metrics for u in range(len(batch.updates))]
    if case.save:
        (root / case.save).mkdir(exist_ok=True)
        policy.save(root / case.save)
        # Goes on while the state is written: it must be that of before.
        with exact_float64():
            again = [policy.update(batch, plan, u).metrics["loss"] for u in range(len(batch.updates)) if u]
        assert len(again) == len(updates) - 1
        assert policy.written(wait=True)
        policy.load(root / case.save)
    if case.export:
        policy.export(root / case.export)
        assert policy.written(wait=True)
    weights = {name: tensor.clone() for name, tensor in policy.named_weights()}
    packs = [[len(pack.segments) for pack in ranks] for update in plan.updates for ranks in update]
    return {
        "updates": updates,
        "weights": weights,
        "fingerprint": policy.fingerprint(),
        "packs": packs,
        "old": old.values,
        "count": policy.updates,
    }


def run_ranks(world: int, cases: dict[str, Case], root: Path) -> dict[str, list[dict[str, Any]]]:
    """Every case in `world` processes; results per case and rank."""
    folders = {name: case.make_folder(root) for name, case in cases.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (world, port, cases, folders, root), nprocs=world)
    return {name: [torch.load(root / f"{name}-{rank}.pt") for rank in range(world)] for name in cases}


def _rank(rank: int, world: int, port: int, cases: dict[str, Case], folders: dict[str, Path], root: Path) -> None:
    torchvision_cpu.install()
    from dapo.train.parallel import leave

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, case in cases.items():
        torch.save(run_case(case, folders[name], root, rank, world), root / f"{name}-{rank}.pt")
    leave()
