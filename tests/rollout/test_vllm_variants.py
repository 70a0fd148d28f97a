"""vLLM for real in its other shapes: experts, tied and text-only models, its own process, tensor parallel."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pytest
import torch

from dapo.data.processor import PromptProcessor
from dapo.errors import ConfigError, EngineError, ProofError
from dapo.rollout.verification import compare_fingerprints
from tests.rollout.delivered import delivered
from tests.rollout.processes import free_address, run_two_ranks
from tests.rollout.small import hub_layout, largest_gap, load_plain, make_prompts, sampling, shake

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (make install-vllm)", allow_module_level=True)

from dapo.rollout import vllm_engine, vllm_worker
from dapo.rollout.vllm_engine import VllmEngine
from dapo.rollout.vllm_process import remove_stale_shared_memory

pytestmark = pytest.mark.slow

Folders = Callable[[str], Path]
Processors = Callable[[str], PromptProcessor]
EXACT = 3e-5
ANSWER_S = 20.0
"""Longer than a first answer on a busy machine takes."""


def start(folder: Path, processor: PromptProcessor, **more: object) -> VllmEngine:
    return VllmEngine(folder, processor, max_model_len=256, max_num_seqs=32, kv_cache_mib=32, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["tied", "text"])
def test_twenty_updates_stay_exact(kind: str, folder_of: Folders, processor_of: Processors) -> None:
    processor, trainer = processor_of(kind), load_plain(folder_of(kind))
    engine = start(folder_of(kind), processor)
    prompts, params = make_prompts(processor, 3), sampling(processor, n=2)
    try:
        for version in range(21):
            if version:
                shake(trainer, 0.01, seed=version)
                engine.update_weights(trainer.named_parameters(), version)
                sums = {name: float(p.double().abs().sum()) for name, p in trainer.named_parameters()}
                compare_fingerprints(trainer=sums, engine=engine.fingerprint())
            out = engine.generate(prompts, params)
            assert largest_gap(trainer, processor, prompts, out, params.temperature) < EXACT
    finally:
        engine.close()


# Each of these passes the fingerprint; the run's own probe stops it.


def test_experts_that_were_not_packed_again_stop_the_run(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    if vllm.__version__ != "0.32.0":
        pytest.skip("only 0.32 skips the packing of reloaded experts")
    with delivered(folder_of("moe"), tmp_path / "journal", engine="vllm") as run:
        assert run.deliver() < EXACT
        run.update()
        monkeypatch.setattr(vllm_worker.WorkerExtension, "_dapo_on_cpu", lambda self: False)
        with pytest.raises(ProofError, match="log-prob probe after the sync of step 1"):
            run.deliver()


def test_experts_of_square_shape_given_transposed_stop_the_run(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        return vllm_worker.to_checkpoint_names(
            (name, hub_layout(name, p) if name.endswith("gate_up_proj") else p) for name, p in weights
        )

    with delivered(folder_of("square_moe"), tmp_path / "journal", engine="vllm") as run:
        assert run.deliver() < EXACT
        run.update()
        monkeypatch.setattr(vllm_engine, "to_checkpoint_names", turned)
        with pytest.raises(ProofError, match="log-prob probe after the sync of step 1"):
            run.deliver()


def test_experts_given_transposed_do_not_fit_where_they_are_not_square(
    folder_of: Folders, processor_of: Processors
) -> None:
    trainer, engine = load_plain(folder_of("moe")), start(folder_of("moe"), processor_of("moe"))
    transposed = [(name, hub_layout(name, p)) for name, p in trainer.named_parameters()]
    try:
        with pytest.raises(EngineError, match="version 3 failed"):
            engine.update_weights(transposed, version=3)
    finally:
        engine.close()


def test_a_tied_head_that_was_not_packed_again_stops_the_run(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    if vllm.__version__.startswith("0.23."):
        pytest.skip("0.23 reads the embeddings themselves")
    with delivered(folder_of("tied"), tmp_path / "journal", engine="vllm") as run:
        assert run.deliver() < EXACT
        run.update()
        monkeypatch.setattr(vllm_worker.WorkerExtension, "_dapo_pack_head", lambda self: None)
        with pytest.raises(ProofError, match="log-prob probe after the sync of step 1"):
            run.deliver()


def test_a_kept_tensor_that_is_damaged_in_the_engine_stops_the_run(folder_of: Folders, tmp_path: Path) -> None:
    with delivered(folder_of("dense"), tmp_path / "journal", engine="vllm") as run:
        assert run.deliver() < EXACT
        engine: Any = run.worker.engine
        model = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        norms = [p for name, p in model.named_parameters() if name.endswith("layers.1.input_layernorm.weight")]
        assert norms
        norms[0].data.mul_(1.5)
        with pytest.raises(ProofError, match="log-prob probe after the sync of step 1"):
            run.deliver()  # nothing changed in the trainer: nothing is sent


@pytest.mark.parametrize("kind", ["dense", "moe", "tied"])
def test_modules_that_did_not_change_are_kept(kind: str, folder_of: Folders, processor_of: Processors) -> None:
    """Whatever part is sent, the engine computes with all of the trainer's weights."""
    processor, trainer = processor_of(kind), load_plain(folder_of(kind))
    engine = start(folder_of(kind), processor)
    prompts, params = make_prompts(processor, 2), sampling(processor, n=2)
    parts = ["visual", "layers.1", "lm_head", "embed_tokens"]
    try:
        with pytest.raises(EngineError, match="was not sent, and this engine has never been given it"):
            engine.update_weights(iter(()), 1, ["model.language_model.norm.weight"])
        engine.update_weights(trainer.named_parameters(), 1)
        for version, part in enumerate(parts, 2):
            moved = torch.nn.ParameterDict({n.replace(".", "/"): p for n, p in trainer.named_parameters() if part in n})
            shake(moved, 0.05, seed=version)
            sent = [(name, p) for name, p in trainer.named_parameters() if part in name]
            kept = [name for name, _ in trainer.named_parameters() if part not in name]
            engine.update_weights(sent, version, kept)
            sums = {name: float(p.double().abs().sum()) for name, p in trainer.named_parameters()}
            compare_fingerprints(trainer=sums, engine=engine.fingerprint())
            out = engine.generate(prompts, params)
            assert largest_gap(trainer, processor, prompts, out, params.temperature) < EXACT, part
    finally:
        engine.close()


def test_tensor_parallel_processes_take_weights_through_shared_memory(
    folder_of: Folders, processor_of: Processors
) -> None:
    processor, trainer = processor_of("dense"), load_plain(folder_of("dense"))
    engine = start(folder_of("dense"), processor, separate_process=True, tensor_parallel=2)
    prompts, params = make_prompts(processor, 3), sampling(processor, n=2)
    try:
        for version in (1, 2):
            shake(trainer.lm_head if version == 2 else trainer, 0.05, seed=version)
            named = list(trainer.named_parameters())
            sent = [(name, p) for name, p in named if version == 1 or "lm_head" in name]
            engine.update_weights(sent, version, {name for name, _ in named} - {name for name, _ in sent})
            sums = {name: float(p.double().abs().sum()) for name, p in named}
            compare_fingerprints(trainer=sums, engine=engine.fingerprint())
            assert largest_gap(trainer, processor, prompts, engine.generate(prompts, params), 0.8) < EXACT
        assert not list(Path("/dev/shm").glob(f"dapo-weights-{os.getpid()}-*"))
    finally:
        engine.close()


def test_an_engine_process_that_is_killed_is_an_error_and_a_new_one_starts(
    folder_of: Folders, processor_of: Processors
) -> None:
    says = "ended while it was needed"
    processor, trainer = processor_of("dense"), load_plain(folder_of("dense"))
    prompts = make_prompts(processor, 3)
    endless = sampling(processor, n=4, max_tokens=150, stop_token_ids=(), finish_share=0.99)
    before = set(multiprocessing.active_children())
    engine = start(folder_of("dense"), processor, separate_process=True, tensor_parallel=2)
    engine.update_weights(trainer.named_parameters(), 1)
    (core,) = set(multiprocessing.active_children()) - before
    workers = psutil.Process(core.pid).children(recursive=True)
    mapped = {m.path for one in [psutil.Process(core.pid), *workers] for m in one.memory_maps()}
    shared = {Path(path) for path in mapped if "cpushm" in path}
    queues = {Path(path) for path in mapped if path.startswith("/dev/shm/psm_")}
    assert shared
    assert queues
    killer = Timer(0.3, os.kill, [core.pid, signal.SIGKILL])
    killer.start()
    started = time.monotonic()
    with pytest.raises(EngineError, match=says):
        # Long enough for the signal to come while tokens are written.
        [engine.generate(prompts, endless) for _ in range(100)]
    assert time.monotonic() - started < 30
    with pytest.raises(EngineError, match=says):
        engine.update_weights(trainer.named_parameters(), 2)
    engine.close()
    assert not core.is_alive()
    assert not [path for path in queues if path.exists()]
    new = start(folder_of("dense"), processor, separate_process=True, tensor_parallel=2)
    new.update_weights(trainer.named_parameters(), 1)
    out = new.generate(prompts, sampling(processor, n=2))
    assert largest_gap(trainer, processor, prompts, out, 0.8) < EXACT
    new.close()
    remove_stale_shared_memory()  # as the next start does
    assert not [path for path in shared if path.exists()]


@pytest.mark.parametrize("stopped", ["core", pytest.param("worker", marks=pytest.mark.nightly)])
def test_an_engine_process_that_is_stopped_is_an_error_in_time_and_a_new_one_starts(
    stopped: str, folder_of: Folders, processor_of: Processors
) -> None:
    """As one that is stuck in a kernel: it answers nobody, and obeys nothing but SIGKILL."""
    processor, trainer = processor_of("dense"), load_plain(folder_of("dense"))
    prompts = make_prompts(processor, 3)
    endless = sampling(processor, n=4, max_tokens=150, stop_token_ids=(), finish_share=0.99)
    ranks = 1 if stopped == "core" else 2
    before = set(multiprocessing.active_children())
    engine = start(folder_of("dense"), processor, separate_process=True, tensor_parallel=ranks, answer_s=ANSWER_S)
    engine.update_weights(trainer.named_parameters(), 1)
    (core,) = set(multiprocessing.active_children()) - before
    family = [psutil.Process(core.pid), *psutil.Process(core.pid).children(recursive=True)]
    stop = Timer(0.3, family[0 if stopped == "core" else -1].suspend)
    stop.start()
    started = time.monotonic()
    with pytest.raises(EngineError, match=f"did not answer within {ANSWER_S:.0f} s and was killed"):
        # Long enough for the signal to come while tokens are written.
        [engine.generate(prompts, endless) for _ in range(100)]
    assert time.monotonic() - started < ANSWER_S + 15
    engine.close()
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    new = start(folder_of("dense"), processor, separate_process=True, tensor_parallel=ranks)
    new.update_weights(trainer.named_parameters(), 1)
    out = new.generate(prompts, sampling(processor, n=2))
    assert largest_gap(trainer, processor, prompts, out, 0.8) < EXACT
    new.close()


def test_an_engine_process_ends_with_the_process_it_serves(folder_of: Folders) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.rollout.owner", str(folder_of("text"))], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    core = psutil.Process(int(owner.stdout.readline()))
    owner.kill()
    core.wait(timeout=20)
    owner.wait()


@pytest.mark.nightly  # test_twenty_updates.py does the same with the real trainer
@pytest.mark.parametrize(("kind", "tensor_parallel"), [("dense", 2), ("moe", 2), ("dense", 1)])
def test_ranks_of_a_trainer_agree_with_it(kind: str, tensor_parallel: int, folder_of: Folders) -> None:
    """Two ranks: one engine over both, or a replica each with prompts of its own."""
    port = free_address().rpartition(":")[2]
    results = run_two_ranks(
        "tests.rollout.tp_rank",
        lambda rank: (folder_of(kind), rank, 2, port, tensor_parallel),
        lambda _: {"OMP_NUM_THREADS": "1"},
        timeout_s=240,
    )
    assert (results[0]["ids"] == results[1]["ids"]) == (tensor_parallel == 2)
    assert max(gap for result in results for gap in result["gaps"]) < EXACT
    assert results[0]["ranks"] == 2


def test_vllm_refusing_its_arguments_is_one_clear_error(folder_of: Folders, processor_of: Processors) -> None:
    with pytest.raises(ConfigError, match="vLLM refuses to start"):
        VllmEngine(folder_of("text"), processor_of("text"), max_model_len=10_000_000, kv_cache_mib=1)


def test_vllm_on_cpu_is_not_asked_for_the_experts_it_chose(folder_of: Folders, processor_of: Processors) -> None:
    with pytest.raises(ConfigError, match=r"vLLM on CPU does not report .* rollout\.engine=transformers"):
        VllmEngine(folder_of("moe"), processor_of("moe"), return_routed_experts=True)


def test_kv_cache_of_bfloat16_stays_near(folder_of: Folders, processor_of: Processors) -> None:
    processor = processor_of("dense")
    engine = start(folder_of("dense"), processor, dtype="bfloat16")
    prompts, params = make_prompts(processor, 3), sampling(processor, n=2)
    try:
        out = engine.generate(prompts, params)
        assert largest_gap(load_plain(folder_of("dense")), processor, prompts, out, 0.8) < 0.5
    finally:
        engine.close()
    assert torch.get_default_dtype() is torch.float32
