"""Garbage is refused, and the proof after a sync names the first wrong tensor."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from dapo.config.run import RunConfig
from dapo.errors import ConfigError, EngineError, ProofError
from dapo.rollout.factory import choose_engine, make_engine
from dapo.rollout.verification import (
    agreed_sums,
    check_completion,
    check_probe,
    compare_fingerprints,
    default_tolerance,
    probe_gap,
)
from dapo.rollout.vllm_engine import VllmEngine
from dapo.types import Completion, FinishReason


def completion(ids: tuple[int, ...], logprobs: tuple[float, ...]) -> Completion:
    return Completion(ids, logprobs, FinishReason.STOP, 0)


def test_a_response_in_order_passes() -> None:
    check_completion(completion((0, 9), (-0.5, 0.0)), 10, banned=(5,))


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ((), (), "0 tokens with 0"),
        ((1, 2), (-1.0,), "2 tokens with 1"),
        ((1, 10), (-1.0, -1.0), "token 10; the vocabulary has 10"),
        ((-1, 3), (-1.0, -1.0), "token -1"),
        ((1, 2), (-1.0, -math.inf), "log-probability -inf"),
        ((1, 2), (math.nan, -1.0), "log-probability nan"),
        ((1, 2), (-1.0, 0.5), r"log-probability 0\.5"),
        ((1, 5), (-1.0, -1.0), r"\{5\}, which is banned"),
    ],
)
def test_garbage_is_refused(ids: tuple[int, ...], logprobs: tuple[float, ...], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_completion(completion(ids, logprobs), 10, banned=(5,))


def test_equal_fingerprints_pass_whatever_the_order_of_addition() -> None:
    compare_fingerprints(trainer={"a": 1.0, "b": 0.0}, engine={"b": 0.0, "a": 1.0 + 1e-12, "tied": 3.0})


def test_a_worker_that_was_given_something_else_is_named() -> None:
    assert agreed_sums([{"a": 1.0}, {"a": 1.0 + 1e-12}]) == {"a": 1.0}
    with pytest.raises(EngineError, match=r"of b is 2\.0 in worker 0 and 2\.5 in worker 2"):
        agreed_sums([{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.5}])
    with pytest.raises(EngineError, match="of b is None in worker 0 and 2"):
        agreed_sums([{"a": 1.0}, {"a": 1.0, "b": 2.0}])


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"a": 1.0, "c": 2.0}, "no tensor b"),
        ({"a": 1.0, "b": 2.001, "c": 9.0}, "b did not arrive.*first wrong tensor"),
        ({"a": 1.0, "b": math.nan, "c": 9.0}, "b did not arrive"),
        ({}, "empty"),
    ],
)
def test_the_first_wrong_tensor_is_named(engine: dict[str, float], message: str) -> None:
    with pytest.raises(ProofError, match=message):
        compare_fingerprints(trainer={"a": 1.0, "b": 2.0, "c": 2.0}, engine=engine)


def test_probe_gap_is_the_mean_over_all_tokens() -> None:
    gap = probe_gap([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]])
    assert (gap.mean, gap.largest, gap.tokens) == (0.5, 1.0, 3)
    assert probe_gap([[math.nan]], [[-1.0]]).mean == math.inf


def test_probe_without_tokens_proves_nothing() -> None:
    with pytest.raises(EngineError, match="no tokens"):
        probe_gap([], [])


@pytest.mark.parametrize(
    ("ours", "cause"), [(-1.0001, None), (-1.05, "image features"), (-4.0, "other weights"), (math.nan, "NaN")]
)
def test_probe_says_what_the_size_of_the_gap_points_at(ours: float, cause: str | None) -> None:
    gap = probe_gap([[ours]], [[-1.0]])
    if cause is None:
        check_probe(gap, 1e-3, after="wake-up")
        return
    with pytest.raises(ProofError, match=f"after weight sync to version 3.*{cause}"):
        check_probe(gap, 1e-3, after="weight sync to version 3")


def test_the_coarser_of_two_precisions_decides_what_the_probe_allows() -> None:
    assert default_tolerance("float32", "float32") == 1e-3
    for pair in (("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        assert default_tolerance(*pair) == 0.05


def test_auto_takes_vllm_only_with_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert [choose_engine("auto", kind) for kind in ("cpu", "cuda", "npu")] == ["transformers", "vllm", "vllm"]
    assert choose_engine("vllm", "cpu") == "vllm"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto", "cuda") == "transformers"


@pytest.mark.parametrize(("device", "remedy"), [("cpu", "make install-vllm"), ("cuda", "gpu"), ("npu", "ascend")])
def test_missing_vllm_is_one_sentence_with_the_remedy(
    device: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"rollout.engine=vllm.*{remedy}"):
        choose_engine("vllm", device)


def test_make_engine_takes_dtype_and_limits_from_the_configuration(folder_of, processor_of) -> None:
    config = RunConfig.model_validate({"rollout": {"engine": "transformers", "max_num_seqs": 32, "kv_cache_mib": 8}})
    folder: Path = folder_of("text")
    engine = make_engine(config, folder, processor_of("text"), "cpu")
    weights = {str(t.dtype) for t in engine._weights.values()}  # type: ignore[attr-defined]
    assert weights == {"torch.bfloat16"}  # the model's compute dtype
    assert (engine.max_num_seqs, engine.kv_cache_bytes) == (32, 8 * 2**20)  # type: ignore[attr-defined]


def test_make_engine_hands_vllm_the_process_and_the_deadline_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, folder_of, processor_of
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(VllmEngine, "__init__", lambda self, *args, **more: asked.update(more))
    for separate in (False, True):
        rollout = {"engine": "vllm", "separate_process": separate, "deadline_s": 90.0}
        make_engine(RunConfig.model_validate({"rollout": rollout}), folder_of("text"), processor_of("text"), "cpu")
        assert asked["separate_process"] is separate
        assert asked["answer_s"] == 30.0


def test_a_process_of_its_own_is_refused_where_auto_means_transformers(folder_of, processor_of) -> None:
    config = RunConfig.model_validate({"rollout": {"separate_process": True}})
    with pytest.raises(ConfigError, match=r"rollout\.engine=auto on cpu means transformers here"):
        make_engine(config, folder_of("text"), processor_of("text"), "cpu")


def test_two_tensor_parallel_groups_of_vllm_on_one_machines_cpus_are_refused(
    folder_of, processor_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VllmEngine, "__init__", lambda self, *args, **more: None)
    for devices in (2, 4):
        rollout = {"engine": "vllm", "devices": devices, "tensor_parallel": 2}
        config = RunConfig.model_validate({"rollout": rollout})
        make_engine(config, folder_of("text"), processor_of("text"), "cuda")
        if devices == 2:
            make_engine(config, folder_of("text"), processor_of("text"), "cpu")
    with pytest.raises(ConfigError, match=r"rollout\.devices=4 with rollout\.tensor_parallel=2: .* use rollout\.tens"):
        make_engine(config, folder_of("text"), processor_of("text"), "cpu")
