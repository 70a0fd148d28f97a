"""Weights from a trainer's process to an engine: each transport against a plain copy of the same bytes.

    python -m benchmarks.weight_sync [--rounds 3] [--layers 4] [--json FILE]

The tensors have the shapes of Qwen3-VL-2B's text model (4 of its 28 layers and the embeddings: 1.0 GB in bfloat16) in
one process that is not sharded. What takes them copies them into tensors of its own, as the transformers engine does:

- copy: one `copy_` per tensor, within the process: the limit, for every tensor is read and written once at least.
- same process: what a colocated engine gets, tensor by tensor.
- shared memory: `SharedMemory` to another process.
- broadcast: `Broadcast` over gloo to another process of this machine.

and the two passes that prove a sync: `absolute_sum` (fingerprint) and `checksum` (what changed?).

Rounds of all take turns. GB/s are given per second on the clock and per CPU second (both processes together, kernel
included), because on a busy machine the clock says more about the neighbours. Extra memory is what a process peaks at
above its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.multiprocessing as mp
from torch import Tensor

from dapo.model.tensors import SMALLEST_BUCKET, absolute_sum, checksum, fused_group
from dapo.rollout.broadcast import Broadcast
from dapo.rollout.ipc import Opener, SharedMemory
from dapo.rollout.transport import send_weights

HIDDEN, INNER, QUERY, KEY, VOCABULARY = 2048, 6144, 2048, 1024, 151_936
TRANSPORTS = ("copy", "same process", "shared memory", "broadcast", "fingerprint", "checksums")

Weights = dict[str, Tensor]


def make_weights(layers: int) -> Weights:
    shapes = {"embed_tokens": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        shapes |= {f"layers.{i}.self_attn.{p}_proj": (n, HIDDEN) for p, n in zip("qkv", (QUERY, KEY, KEY), strict=True)}
        shapes[f"layers.{i}.self_attn.o_proj"] = (HIDDEN, QUERY)
        shapes |= {f"layers.{i}.mlp.{p}_proj": (INNER, HIDDEN) for p in ("gate", "up")}
        shapes[f"layers.{i}.mlp.down_proj"] = (HIDDEN, INNER)
    return {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def bucket_bytes(weights: Weights) -> int:
    groups: dict[str, int] = {}
    for name, tensor in weights.items():
        groups[fused_group(name)] = groups.get(fused_group(name), 0) + tensor.nbytes
    return max(SMALLEST_BUCKET, *groups.values())


class Peak:
    """Largest resident memory of this process while it is open, above that at the beginning, GB."""

    def __enter__(self) -> Peak:
        self._before = self._largest = _resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self._largest = max(self._largest, _resident())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.gb = (self._largest - self._before) / 1e9


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def receiver(pipe: Connection, rendezvous: str, layers: int) -> None:
    """The engine's process: takes weights as requested, and reports the cost."""
    torch.set_num_threads(1)
    held = make_weights(layers)
    link = Broadcast(rendezvous, 1, 2, deadline_s=300)

    def take(stream: Iterator[tuple[str, Tensor]], unchanged: frozenset[str] = frozenset()) -> None:
        for name, tensor in stream:
            held[name].copy_(tensor)

    while (transport := pipe.recv()) is not None:
        opener, started = Opener(), time.process_time()
        with Peak() as peak:
            if transport == "broadcast":
                link.receive(take)
            else:
                while message := pipe.recv():
                    take(opener.tensors(*message))
                    pipe.send(None)
        pipe.send((time.process_time() - started, peak.gb, {n: absolute_sum(t) for n, t in held.items()}))


def run(rounds: int, layers: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    here, there = mp.Pipe()
    engine = mp.get_context("spawn").Process(target=receiver, args=(there, rendezvous, layers), daemon=True)
    engine.start()
    torch.manual_seed(1)
    weights = make_weights(layers)
    held = {name: tensor.clone() for name, tensor in weights.items()}
    link, limit = Broadcast(rendezvous, 0, 2, deadline_s=300), bucket_bytes(weights)

    def copy() -> None:
        for name, tensor in weights.items():
            held[name].copy_(tensor)

    def deliver(header: bytes, place: bytes) -> None:
        if place:
            here.send((header, place))
            here.recv()

    def shared_memory() -> None:
        send_weights(weights.items(), SharedMemory(deliver), limit)
        here.send(None)

    work: dict[str, Callable[[], object]] = {
        "copy": copy,
        "same process": lambda: [held[name].copy_(tensor.to(torch.bfloat16)) for name, tensor in weights.items()],
        "shared memory": shared_memory,
        "broadcast": lambda: link.send(weights.items(), (), limit),
        "fingerprint": lambda: [absolute_sum(tensor) for tensor in weights.values()],
        "checksums": lambda: [checksum(tensor) for tensor in weights.values()],
    }
    gigabytes = sum(tensor.nbytes for tensor in weights.values()) / 1e9
    wanted = {name: absolute_sum(tensor) for name, tensor in weights.items()}
    seen: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in TRANSPORTS}
    for _ in range(rounds + 1):  # the first warms up
        for name in TRANSPORTS:
            remote = name in ("shared memory", "broadcast")
            if remote:
                here.send(name)
            clock, cpu, theirs = time.perf_counter(), time.process_time(), (0.0, 0.0, wanted)
            with Peak() as peak:
                work[name]()
                mine = time.process_time() - cpu
                seconds = time.perf_counter() - clock
                if remote:
                    theirs = here.recv()
            assert theirs[2] == wanted, f"{name}: other weights arrived"
            seen[name].append((gigabytes / seconds, gigabytes / (mine + theirs[0]), peak.gb, theirs[1]))
    here.send(None)
    engine.join()
    columns = ("gb_per_s", "gb_per_cpu_s", "sender_extra_gb", "receiver_extra_gb")
    result: dict[str, Any] = {"gigabytes": gigabytes, "bucket_gb": limit / 1e9, "rounds": rounds, "transports": {}}
    for name, rows in seen.items():
        medians = [statistics.median(values) for values in zip(*rows[1:], strict=True)]
        result["transports"][name] = dict(zip(columns, medians, strict=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4, help="of 28")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.rounds, options.layers)
    print(f"{result['gigabytes']:.2f} GB of weights, largest bucket {result['bucket_gb']:.2f} GB, medians")
    print(f"{'':14}{'GB/s':>8}{'of copy':>9}{'GB/CPU s':>10}{'of copy':>9}{'extra GB':>10}{'in engine':>10}")
    limit = result["transports"]["copy"]
    for name, row in result["transports"].items():
        shares = row["gb_per_s"] / limit["gb_per_s"], row["gb_per_cpu_s"] / limit["gb_per_cpu_s"]
        print(
            f"{name:14}{row['gb_per_s']:8.2f}{shares[0]:9.0%}{row['gb_per_cpu_s']:10.2f}{shares[1]:9.0%}"
            f"{row['sender_extra_gb']:10.2f}{row['receiver_extra_gb']:10.2f}"
        )
    if options.json:
        command = f"python -m benchmarks.weight_sync --rounds {options.rounds} --json {options.json}"
        options.json.write_text(json.dumps(result | {"command": command}, indent=1) + "\n")


if __name__ == "__main__":
    main()
