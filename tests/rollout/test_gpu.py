"""On NVIDIA GPUs: memory that sleep gives back, weights through CUDA IPC and through NCCL."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dapo.data.processor import PromptProcessor
from dapo.rollout.verification import compare_fingerprints
from tests.rollout.processes import free_address, run_two_ranks
from tests.rollout.small import largest_gap, load_plain, make_prompts, sampling, shake

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
with_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

Folders = Callable[[str], Path]
Processors = Callable[[str], PromptProcessor]
EXACT = 0.02
"""Nats; float32 with vLLM's kernels against transformers on CPU."""


@with_vllm
def test_sleep_gives_memory_back_and_each_tag_takes_its_own_again(folder_of: Folders, processor_of: Processors) -> None:
    from dapo.rollout.vllm_engine import VllmEngine

    processor, trainer = processor_of("dense"), load_plain(folder_of("dense"))
    random_state = torch.cuda.get_rng_state()
    engine = VllmEngine(folder_of("dense"), processor, device="cuda", max_model_len=256, memory_share=0.3)
    prompts, params = make_prompts(processor, 3), sampling(processor, n=2)
    try:
        assert torch.equal(torch.cuda.get_rng_state(), random_state)
        engine.update_weights(trainer.named_parameters(), 1)
        awake, total = torch.cuda.mem_get_info()
        freed = engine.sleep()
        asleep, _ = torch.cuda.mem_get_info()
        assert freed == asleep - awake
        assert asleep - awake > 0.2 * total  # the cache is nearly all of the engine's 0.3
        shake(trainer, 0.05, seed=1)
        engine.update_weights(trainer.named_parameters(), 2)  # wakes the weights alone
        weights_awake, _ = torch.cuda.mem_get_info()
        assert weights_awake - awake > 0.2 * total
        assert engine.wake()
        assert torch.cuda.mem_get_info()[0] - awake < 0.05 * total
        out = engine.generate(prompts, params)
        assert largest_gap(trainer, processor, prompts, out, params.temperature) < EXACT
    finally:
        engine.close()


@with_vllm
def test_weights_reach_an_engine_in_its_own_process_through_cuda_ipc(
    folder_of: Folders, processor_of: Processors
) -> None:
    from dapo.rollout.vllm_engine import VllmEngine

    processor, trainer = processor_of("dense"), load_plain(folder_of("dense"))
    engine = VllmEngine(
        folder_of("dense"), processor, device="cuda", max_model_len=256, memory_share=0.3, separate_process=True
    )
    prompts, params = make_prompts(processor, 3), sampling(processor, n=2)
    try:
        for version in (1, 2):
            shake(trainer, 0.05, seed=version)
            engine.update_weights(((name, p.cuda()) for name, p in trainer.named_parameters()), version)
            sums = {name: float(p.double().abs().sum()) for name, p in trainer.named_parameters()}
            compare_fingerprints(trainer=sums, engine=engine.fingerprint())
            out = engine.generate(prompts, params)
            assert largest_gap(trainer, processor, prompts, out, params.temperature) < EXACT
    finally:
        engine.close()


RECEIVER = """
import sys, time, torch
from dapo.rollout.broadcast import Broadcast
link = Broadcast(sys.argv[1], 1, 2, device="cuda:1", deadline_s=60)
torch.cuda.set_device(1)
got = []
link.receive(lambda weights, _: got.extend((name, float(t.double().sum())) for name, t in weights))
print(got, flush=True)
link.receive(lambda weights, _: time.sleep(600))
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_brings_weights_and_a_dead_peer_is_an_error_within_the_deadline() -> None:
    from dapo.errors import EngineError
    from dapo.rollout.broadcast import Broadcast

    where = free_address()
    engine = subprocess.Popen([sys.executable, "-c", RECEIVER, where], stdout=subprocess.PIPE, text=True)
    link = Broadcast(where, 0, 2, device="cuda:0", deadline_s=60)
    weights = [(f"layers.{i}.weight", torch.full((2**18,), float(i), device="cuda:0")) for i in range(8)]
    link.send(iter(weights), (), 2**20)
    assert engine.stdout is not None
    assert engine.stdout.readline().strip() == str([(name, float(i * 2**18)) for i, (name, _) in enumerate(weights)])
    engine.kill()
    engine.wait()
    link._deadline_s = 5.0
    with pytest.raises(EngineError, match="member 0 lost an engine during a broadcast"):
        link.send(iter(weights * 100), (), 2**20)
    link.close()  # and this process, with its other groups, lives on
    assert float(torch.ones(3, device="cuda:0").sum()) == 3.0


@with_vllm
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_experts_spread_over_two_gpus_agree_with_the_trainer(folder_of: Folders) -> None:
    port = free_address().rpartition(":")[2]
    results = run_two_ranks(
        "tests.rollout.tp_rank",
        lambda rank: (folder_of("moe"), rank, 2, port, 2, "cuda"),
        lambda rank: {"CUDA_VISIBLE_DEVICES": str(rank)},
        timeout_s=600,
    )
    assert results[0]["ids"] == results[1]["ids"]
    assert max(gap for result in results for gap in result["gaps"]) < EXACT
