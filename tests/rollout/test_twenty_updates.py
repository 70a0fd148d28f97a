"""The engine follows the trainer through twenty real updates: two FSDP ranks, AdamW, the worker's own sync."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

UPDATES = 20
PROMISED = 1e-4
"""Nats, float32; measured 1e-5."""


@pytest.mark.parametrize(
    ("engine", "kind", "tensor_parallel"),
    [
        ("vllm", "dense", 1),
        ("vllm", "dense", 2),
        ("vllm", "moe", 1),
        ("vllm", "moe", 2),
        ("transformers", "dense", 1),
        ("transformers", "moe", 1),
    ],
)
def test_engine_and_trainer_agree_after_every_update(
    engine: str, kind: str, tensor_parallel: int, folder_of: Callable[[str], Path]
) -> None:
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (make install-vllm)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.rollout.updates_rank", str(folder_of(kind))]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), engine, str(tensor_parallel), str(UPDATES)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=500)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    results = [json.loads(text.partition("RESULT ")[2].splitlines()[0]) for text in printed]
    for result in results:
        assert len(result["gaps"]) == UPDATES + 1
        assert max(result["gaps"]) < PROMISED
        assert result["moved"] > 0.1, "the updates hardly changed the policy: the engine may hold the first weights"
