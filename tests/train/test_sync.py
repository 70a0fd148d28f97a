"""What a sync sends: what changed, whole modules, and everything where the engine may not have it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo.data.processor import PromptProcessor
from dapo.errors import EngineError, ProofError
from dapo.rollout.broadcast import Broadcast
from dapo.rollout.factory import make_engine
from dapo.rollout.transformers_engine import TransformersEngine
from dapo.rollout.verification import compare_fingerprints
from dapo.train import parallel, weights
from dapo.train.fsdp_policy import FsdpPolicy
from dapo.train.sync import WeightSync
from tests.model.tiny import TinyProcessor, make_batch, make_folder
from tests.rollout import small
from tests.rollout.processes import free_address
from tests.train.policies import step
from tests.train.reference import run_config

LAYER = "model.language_model.layers.0"


class Taker:
    """Keeps what it was given, like an engine."""

    def __init__(self) -> None:
        self.came: dict[str, torch.Tensor] = {}
        self.kept: frozenset[str] = frozenset()

    def __call__(self, stream: Any, unchanged: frozenset[str]) -> None:
        self.came, self.kept = {name: tensor.clone() for name, tensor in stream}, unchanged


def test_only_what_an_update_changed_is_sent(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "dense")
    policy = FsdpPolicy(run_config({"model": {"freeze_vision": True}}), folder, TinyProcessor("dense", torch.float32))
    sync, take = WeightSync(policy), Taker()
    everything = {name for name, _ in policy.model.named_parameters()}
    first = sync.send(take)
    assert set(take.came) == everything
    assert first.nbytes == 4 * sum(parameter.numel() for parameter in policy.model.parameters())
    assert sync.send(take).nbytes == 0
    assert take.kept == everything
    step(policy, make_batch())
    sent = sync.send(take)
    assert set(take.came) == {name for name in everything if "visual" not in name}
    assert take.kept == {name for name in everything if "visual" in name}
    assert set(sent.fingerprint) == everything
    assert sent.metrics["engine/sync_gb"] == sum(t.nbytes for t in take.came.values()) / 1e9
    sync.forget()
    sync.send(take)
    assert set(take.came) == everything


@pytest.mark.parametrize(
    ("kind", "touched", "group"),
    [
        ("dense", "self_attn.k_proj.weight", {f"self_attn.{p}_proj.weight" for p in "qkv"}),
        ("dense", "mlp.up_proj.weight", {"mlp.gate_proj.weight", "mlp.up_proj.weight"}),
        ("dense", "mlp.down_proj.weight", {"mlp.down_proj.weight"}),
        ("moe", "mlp.experts.down_proj", {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
    ],
)  # fmt: skip
def test_a_module_is_sent_whole_if_any_part_changed(kind: str, touched: str, group: set[str], tmp_path: Path) -> None:
    policy = FsdpPolicy(run_config(), make_folder(tmp_path, kind), TinyProcessor(kind, torch.float32))
    sync, take = WeightSync(policy), Taker()
    sync.send(take)
    parameter = dict(policy.model.named_parameters())[f"{LAYER}.{touched}"]
    with torch.no_grad():
        parameter.view(-1)[[0, 1]] = parameter.view(-1)[[1, 0]]  # the sum of absolute values stays the same
    sync.send(take)
    assert set(take.came) == {f"{LAYER}.{name}" for name in group}


def test_after_a_sync_that_failed_everything_is_sent(tmp_path: Path) -> None:
    policy = FsdpPolicy(run_config(), make_folder(tmp_path, "dense"), TinyProcessor("dense", torch.float32))
    sync, take = WeightSync(policy), Taker()
    sync.send(take)

    def refuse(stream: Any, unchanged: frozenset[str]) -> None:
        raise EngineError("no")

    with pytest.raises(EngineError):
        sync.send(refuse)
    sync.send(take)
    assert len(take.came) == len(list(policy.model.named_parameters()))


def test_a_bucket_holds_the_largest_module_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = FsdpPolicy(run_config(), make_folder(tmp_path, "moe"), TinyProcessor("moe", torch.float32))
    monkeypatch.setattr(weights, "SMALLEST_BUCKET", 0)
    largest = max(
        sum(p.nbytes for name, p in policy.model.named_parameters() if name.startswith(module))
        for module in (f"{LAYER}.mlp.experts.", "model.language_model.embed_tokens.")
    )
    assert weights.bucket_bytes(policy.model, torch.float32) == largest
    assert weights.bucket_bytes(policy.model, torch.bfloat16) == largest // 2


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("rollout", ["auto", "float32", "bfloat16"])
def test_engine_and_trainer_agree_at_any_pair_of_precisions(rollout: str, compute: str, tmp_path: Path) -> None:
    folder = small.make_folder(tmp_path, "moe")
    config = run_config({"rollout": {"engine": "transformers", "dtype": rollout}, "model": {"compute_dtype": compute}})
    processor = PromptProcessor(folder)
    policy, engine = FsdpPolicy(config, folder, processor), make_engine(config, folder, processor, "cpu")
    sync = WeightSync(policy)
    name, parameter = next((n, p) for n, p in policy.model.named_parameters() if n.endswith("experts.down_proj"))

    def deliver(version: int) -> None:
        sent = sync.send(lambda weights, unchanged: engine.update_weights(weights, version, unchanged))
        compare_fingerprints(trainer=sent.fingerprint, engine=engine.fingerprint())

    for version in (1, 2):
        with torch.no_grad():
            parameter.add_(0.5)
        deliver(version)

    def damaged(weights: Any, unchanged: frozenset[str]) -> None:
        engine.update_weights(((n, -2 * t if n == name else t) for n, t in weights), 3, unchanged)

    with torch.no_grad():
        parameter.add_(0.5)
    sent = sync.send(damaged)
    with pytest.raises(ProofError, match=f"{name} did not arrive"):
        compare_fingerprints(trainer=sent.fingerprint, engine=engine.fingerprint())
    sync.forget()
    deliver(4)


@pytest.mark.slow
def test_sharded_trainer_and_an_engine_on_other_devices(tmp_path: Path) -> None:
    """Two FSDP ranks and an engine that shares no process with them; one of the ranks' engines is only a helper."""
    folder = small.make_folder(tmp_path / "model", "moe")
    torch.multiprocessing.spawn(_member, (folder, free_address(), free_address(), tmp_path), nprocs=3)
    trained, helped, engine = (torch.load(tmp_path / f"{i}.pt") for i in range(3))
    for one, two, held in zip(trained["fingerprints"], helped["fingerprints"], engine["fingerprints"], strict=True):
        assert one == two
        compare_fingerprints(trainer=one, engine=held)
    assert trained["bytes"] == helped["bytes"]
    assert trained["bytes"][1] == 0
    experts = f"{LAYER}.mlp.experts"
    assert engine["came"][2] == [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
    assert len(engine["came"][0]) == len(engine["came"][4]) == len(trained["fingerprints"][0])
    assert trained["failures"] == [
        None,
        None,
        None,
        "EngineError",
        None,
    ]  # its own engine refused; the other rank went on
    assert helped["failures"] == [None] * 5


def _member(member: int, folder: Path, ranks: str, link: str, out: Path) -> None:
    torch.set_num_threads(1)
    result = _engine(folder, link) if member == 2 else _trainer(member, folder, ranks, link)
    torch.save(result, out / f"{member}.pt")


def _trainer(rank: int, folder: Path, ranks: str, link: str) -> dict[str, Any]:
    host, _, port = ranks.rpartition(":")
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    parallel.MIN_GROUP_BYTES, weights.SMALLEST_BUCKET = 0, 0
    policy = FsdpPolicy(run_config(world_size=2), folder, PromptProcessor(folder), rank, 2)
    sync = WeightSync(policy)
    broadcast = Broadcast(link, 0, 2, deadline_s=60) if rank == 0 else None
    found: dict[str, Any] = {"fingerprints": [], "bytes": [], "failures": []}
    for turn in range(5):
        if turn == 2 and rank == 1:  # only the second rank's shard changes
            local: Any = dict(policy.model.named_parameters())[f"{LAYER}.mlp.experts.down_proj"]
            with torch.no_grad():
                local.to_local().add_(0.5)

        def take(stream: Any, unchanged: frozenset[str], turn: int = turn) -> None:
            assert broadcast is not None
            broadcast.send(stream, unchanged, sync.bucket_bytes)
            if turn == 3:
                raise EngineError("refused afterwards")

        try:
            sent = sync.send(take if broadcast else None)
            found["bytes"].append(sent.nbytes)
            found["failures"].append(None)
        except EngineError as error:
            found["bytes"].append(0)
            found["failures"].append(type(error).__name__)
        found["fingerprints"].append(policy.fingerprint())
    policy.close()
    return found


def _engine(folder: Path, link: str) -> dict[str, Any]:
    engine = TransformersEngine(folder, PromptProcessor(folder))
    broadcast = Broadcast(link, 1, 2, deadline_s=60)
    found: dict[str, Any] = {"fingerprints": [], "came": []}
    for turn in range(5):
        came: list[str] = []

        def take(stream: Any, unchanged: frozenset[str], turn: int = turn, came: list[str] = came) -> None:
            def noted() -> Any:
                for name, tensor in stream:
                    came.append(name)
                    yield name, tensor

            engine.update_weights(noted(), turn, unchanged)

        broadcast.receive(take)
        found["came"].append(came)
        found["fingerprints"].append(engine.fingerprint())
    return found
