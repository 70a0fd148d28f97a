"""The engine follows the trainer through twenty real updates: two FSDP ranks, AdamW, the worker's own sync."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rollout.processes import free_address, run_two_ranks

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
    port = free_address().rpartition(":")[2]
    results = run_two_ranks(
        "tests.rollout.updates_rank",
        lambda rank: (folder_of(kind), rank, port, engine, tensor_parallel, UPDATES),
        lambda _: {"OMP_NUM_THREADS": "1"},
        timeout_s=500,
    )
    for result in results:
        assert len(result["gaps"]) == UPDATES + 1
        assert max(result["gaps"]) < PROMISED
        assert result["moved"] > 0.1, "the updates hardly changed the policy: the engine may hold the first weights"
