"""Weights to engines in other processes: over a real gloo group, and what happens when it goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo.data.processor import PromptProcessor
from dapo.errors import EngineError, ProofError
from dapo.model.tensors import absolute_sum, fused_group, in_buckets
from dapo.rollout.broadcast import Broadcast
from dapo.rollout.transformers_engine import TransformersEngine
from dapo.rollout.transport import Header, Unpacker, send_weights
from dapo.rollout.verification import compare_fingerprints
from tests.rollout.processes import free_address
from tests.rollout.small import largest_gap, load_plain, make_prompts, sampling, shake

Folders = Callable[[str], Path]
Processors = Callable[[str], PromptProcessor]
LIMIT = 20_000
"""Bytes: the small models here fill many buckets."""


@pytest.fixture
def members() -> Iterator[list[Broadcast]]:
    """A trainer and two engines; threads stand for processes (the group itself is the same)."""
    where = free_address()
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda i: Broadcast(where, i, 3, deadline_s=30), range(3)))
    yield made
    for one in made:
        one.close()


def sums(model: Any) -> dict[str, float]:
    return {name: float(p.double().abs().sum()) for name, p in model.named_parameters()}


def sync(
    members: Sequence[Broadcast],
    weights: Any,
    engines: Sequence[Any],
    version: int,
    unchanged: Sequence[str] = (),
) -> list[Exception | None]:
    """One sync, everybody at the same time; what each ended with."""

    def part(member: int) -> Exception | None:
        try:
            if member == 0:
                members[0].send(weights, unchanged, LIMIT)
            else:
                engine = engines[member - 1]
                members[member].receive(lambda w, kept: engine.update_weights(w, version, kept))
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(part, range(3)))


def test_engines_elsewhere_get_the_weights_and_prove_it(
    members: list[Broadcast], folder_of: Folders, processor_of: Processors
) -> None:
    processor, trainer = processor_of("moe"), load_plain(folder_of("moe"))
    engines = [TransformersEngine(folder_of("moe"), processor) for _ in range(2)]
    prompts, params = make_prompts(processor, 2), sampling(processor, n=2)
    for version in (1, 2):
        shake(trainer, 0.05, seed=version)
        assert sync(members, trainer.named_parameters(), engines, version) == [None] * 3
        for engine in engines:
            compare_fingerprints(trainer=sums(trainer), engine=engine.fingerprint())
    out = engines[1].generate(prompts, params)
    assert out[0][0].policy_version == 2
    assert largest_gap(trainer, processor, prompts, out, params.temperature) < 1e-5


def test_what_did_not_change_stays_and_is_proven_as_well(
    members: list[Broadcast], folder_of: Folders, processor_of: Processors
) -> None:
    trainer = load_plain(folder_of("dense"))
    engines = [TransformersEngine(folder_of("dense"), processor_of("dense")) for _ in range(2)]
    kept = [name for name, _ in trainer.named_parameters() if "visual" in name]
    assert sync(members, trainer.named_parameters(), engines, 1) == [None] * 3
    shake(trainer.model.language_model, 0.05, seed=1)
    sent = [(name, p) for name, p in trainer.named_parameters() if name not in kept]
    assert sync(members, sent, engines, 2, kept) == [None] * 3
    compare_fingerprints(trainer=sums(trainer), engine=engines[0].fingerprint())
    shake(trainer.model.visual.merger, 0.05, seed=2)  # changed after all: kept by mistake
    assert sync(members, sent, engines, 3, kept) == [None] * 3
    with pytest.raises(ProofError, match=r"model\.visual\.merger\.\S+ did not arrive"):
        compare_fingerprints(trainer=sums(trainer), engine=engines[0].fingerprint())


def test_an_engine_that_refuses_half_way_keeps_nobody_waiting(
    members: list[Broadcast], folder_of: Folders, processor_of: Processors
) -> None:
    trainer = load_plain(folder_of("dense"))
    engines = [TransformersEngine(folder_of("dense"), processor_of("dense")) for _ in range(2)]
    refusing = engines[0]
    right, refusing._weights = refusing._weights, dict(list(refusing._weights.items())[:5])
    trained, refused, fine = sync(members, trainer.named_parameters(), engines, 1)
    assert (trained, fine) == (None, None)
    assert "no such tensor" in str(refused)
    refusing._weights = right
    assert sync(members, trainer.named_parameters(), engines, 2) == [None] * 3


def test_an_engine_that_refuses_before_the_first_tensor_keeps_nobody_waiting(
    members: list[Broadcast], folder_of: Folders, processor_of: Processors, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = load_plain(folder_of("dense"))
    engines = [TransformersEngine(folder_of("dense"), processor_of("dense")) for _ in range(2)]

    def refuse(weights: Any, version: int, unchanged: Any) -> None:
        raise EngineError("asleep")

    with monkeypatch.context() as patch:
        patch.setattr(engines[0], "update_weights", refuse)
        trained, refused, fine = sync(members, trainer.named_parameters(), engines, 1)
    assert (trained, str(refused), fine) == (None, "asleep", None)
    assert sync(members, trainer.named_parameters(), engines, 2) == [None] * 3


def test_a_trainer_that_fails_half_way_tells_the_engines_why(
    members: list[Broadcast], folder_of: Folders, processor_of: Processors
) -> None:
    trainer = load_plain(folder_of("dense"))
    engines = [TransformersEngine(folder_of("dense"), processor_of("dense")) for _ in range(2)]

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from list(trainer.named_parameters())[:20]
        raise ConnectionError("a rank is gone")

    trained, *others = sync(members, broken(), engines, 1)
    assert isinstance(trained, ConnectionError)
    for other in others:
        assert "the sender broke off at bucket" in str(other)
        assert "ConnectionError: a rank is gone" in str(other)
    assert sync(members, trainer.named_parameters(), engines, 2) == [None] * 3


# traps: a carrier that damages what it carries


class Damaged:
    """Delivers buckets to a list, and one of them wrongly."""

    def __init__(self, damage: Callable[[list[tuple[Header, Tensor]]], None]) -> None:
        self.sent: list[tuple[Header, Tensor]] = []
        self.damage = damage

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def send(self, header: Header, buffer: Tensor) -> None:
        self.sent.append((Header.from_bytes(header.to_bytes()), buffer))
        if header.last:
            self.damage(self.sent)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        unpacker = Unpacker()
        for header, buffer in self.sent:
            if header.last:
                unpacker.check(header)
            else:
                yield from unpacker.tensors(header, buffer)


def drop(sent: list[tuple[Header, Tensor]]) -> None:
    del sent[2]


def drop_the_last(sent: list[tuple[Header, Tensor]]) -> None:
    del sent[-2]


def swap(sent: list[tuple[Header, Tensor]]) -> None:
    """The contents of two buckets of the same shapes, the headers in order: two layers change places."""
    for i, (one, _) in enumerate(sent):
        for k, (other, _) in enumerate(sent[i + 1 :], i + 1):
            if one.shapes == other.shapes and one.nbytes and "weight" in one.names[0] and len(one.shapes[0]) > 1:
                sent[i], sent[k] = (one, sent[k][1]), (other, sent[i][1])
                return
    raise AssertionError("no two buckets of the same shape")


def cut(sent: list[tuple[Header, Tensor]]) -> None:
    sent[3] = (sent[3][0], sent[3][1][:-64])


def poison(sent: list[tuple[Header, Tensor]]) -> None:
    sent[1][1][:4] = torch.tensor([float("nan")]).view(torch.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"bucket 3 \(from \S+ on\) came when bucket 2 was due: a bucket was lost"),
        (drop_the_last, r"the end mark came when bucket \d+ was due"),
        (swap, r"(\S+)\.weight did not arrive: sum .* first wrong tensor"),
        (cut, r"bucket 3 \(from \S+ on\) holds \d+ bytes, its tensors have \d+: it was cut off"),
        (poison, r"model\.\S+ did not arrive: sum of \|values\| is nan"),
    ],
    ids=["dropped", "last-dropped", "swapped", "truncated", "nan"],
)
def test_a_damaged_bucket_is_named(damage: Any, message: str, folder_of: Folders, processor_of: Processors) -> None:
    trainer = load_plain(folder_of("dense"))
    engine = TransformersEngine(folder_of("dense"), processor_of("dense"))
    carrier = Damaged(damage)
    send_weights(trainer.named_parameters(), carrier, LIMIT)
    assert len(carrier.sent) > 6

    def take_and_compare() -> None:
        engine.update_weights(carrier.weights(), version=1)
        compare_fingerprints(trainer=sums(trainer), engine=engine.fingerprint())

    with pytest.raises((EngineError, ProofError), match=message):
        take_and_compare()


def test_modules_stay_whole_in_any_bucket_size(folder_of: Folders) -> None:
    for kind in ("moe", "tied"):
        named = list(load_plain(folder_of(kind)).named_parameters())
        for limit in (1, LIMIT, 10**9):
            buckets = list(in_buckets(named, limit, lambda t: t.nbytes))
            assert [item for bucket in buckets for item in bucket] == named
            where: dict[str, set[int]] = {}
            for index, bucket in enumerate(buckets):
                for name, _ in bucket:
                    where.setdefault(fused_group(name), set()).add(index)
            assert all(len(indices) == 1 for indices in where.values())
        layer = "model.language_model.layers.0"
        assert f"{layer}.self_attn.qkv_proj" in where
        assert (f"{layer}.mlp.experts" if kind == "moe" else f"{layer}.mlp.gate_up_proj") in where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fast_sum_is_the_exact_one(dtype: torch.dtype) -> None:
    for size in (0, 1, 1000, 65536, 200_001):
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        assert absolute_sum(tensor) == pytest.approx(float(tensor.double().abs().sum()), rel=1e-14)
    assert absolute_sum(torch.full((100_000,), torch.nan)) != absolute_sum(torch.zeros(1))


# processes that die or never come


def test_a_member_that_does_not_come_is_reported_within_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"member 0 of 2 did not reach all others .* within 2 s"):
        Broadcast(free_address(), 0, 2, deadline_s=2)
    assert time.monotonic() - started < 30


def test_leaving_a_group_ends_what_waits_in_it() -> None:
    where = free_address()
    with ThreadPoolExecutor(2) as pool:
        trainer, engine = pool.map(lambda i: Broadcast(where, i, 2, deadline_s=60), range(2))
        receiving = pool.submit(engine.receive, lambda weights, _: list(weights))
        trainer.close()
        with pytest.raises(EngineError, match="member 1 lost the trainer"):
            receiving.result(timeout=30)
        engine.close()


RECEIVER = """
import sys, time
from dapo.rollout.broadcast import Broadcast
link = Broadcast(sys.argv[1], 1, 2, deadline_s=60)
def slow(weights, unchanged):
    next(weights)
    print("started", flush=True)
    time.sleep(600)
link.receive(slow)
"""


@pytest.mark.slow
def test_an_engine_killed_during_a_sync_is_noticed_and_a_new_group_serves_the_next() -> None:
    where = free_address()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    engine = subprocess.Popen([sys.executable, "-c", RECEIVER, where], env=environment, stdout=subprocess.PIPE)
    link = Broadcast(where, 0, 2, deadline_s=60)
    weights = [(f"layers.{i}.weight", torch.ones(2**20)) for i in range(64)]

    def sent() -> Iterator[tuple[str, Tensor]]:
        for i, item in enumerate(weights):
            if i == 3:  # bucket 0 is sent; the receiver takes no more than that
                assert engine.stdout is not None
                assert engine.stdout.readline() == b"started\n"
                engine.send_signal(signal.SIGKILL)
                engine.wait()
            yield item

    with pytest.raises(EngineError, match="member 0 lost an engine during a broadcast"):
        link.send(sent(), (), 2**20)
    link.close()
    address = free_address()
    with ThreadPoolExecutor(2) as pool:
        new = list(pool.map(lambda i: Broadcast(address, i, 2, deadline_s=30), range(2)))
        got: list[str] = []
        receiving = pool.submit(new[1].receive, lambda stream, _: got.extend(name for name, _ in stream))
        new[0].send(iter(weights), (), 2**20)
        receiving.result()
    assert got == [name for name, _ in weights]
