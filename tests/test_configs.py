"""The shipped configurations: all valid, and the recipe's numbers are the published ones."""

from pathlib import Path

import pytest

from dapo.config import io

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_is_valid_and_resolves_to_itself(path, tmp_path):
    config = io.load(path)
    io.save(config, tmp_path / "resolved.yaml")
    assert io.load(tmp_path / "resolved.yaml") == config


def test_recipe_has_the_published_numbers():
    c = io.load(CONFIGS / "geo3k.yaml")
    assert (c.batch.prompts_per_step, c.batch.prompts_per_round, c.batch.group_size) == (64, 192, 8)
    assert (c.batch.prompts_per_update, c.updates_per_step) == (16, 4)
    assert (c.data.max_prompt_tokens, c.batch.max_response_tokens, c.batch.tokens_per_pack) == (1024, 2048, 3072)
    loss = c.algorithm.loss
    assert loss.kind == "dapo"
    assert (loss.clip.low, loss.clip.high, loss.clip.dual) == (0.2, 0.28, 10.0)
    assert c.algorithm.aggregation == "token-mean"
    assert (c.algorithm.entropy_coef, c.algorithm.kl.needs_reference) == (0.0, False)
    assert (c.algorithm.sampling.enabled, c.algorithm.sampling.max_rounds) == (True, 4)
    over = c.algorithm.overlong
    assert (over.soft_punishment, over.factor, over.filter_truncated) == (False, 1.0, False)
    assert (c.rollout.temperature, c.rollout.top_p, c.rollout.top_k) == (1.0, 1.0, -1)
    v = c.validation
    assert (v.before_training, v.samples, v.temperature, v.top_p, v.top_k) == (True, 1, 1.0, 0.7, -1)
    o = c.model.optimizer
    assert (o.lr, o.weight_decay, o.max_grad_norm) == (1e-6, 0.1, 1.0)
    assert o.warmup_updates == 10 * c.updates_per_step
    t = c.train
    assert (t.epochs, t.steps, t.test_freq, t.save_freq, t.resume) == (30, 100, 1, 20, "auto")
    p = c.model.parallel
    assert (p.world_size, p.fsdp_size, p.sequence_parallel, p.reshard_after_forward) == (16, 16, 8, True)
    assert (p.offload_optimizer, p.offload_reference, c.model.gradient_checkpointing) == (True, True, True)
    r = c.rollout
    assert (r.engine, r.tensor_parallel, r.expert_parallel, r.memory_share) == ("vllm", 8, True, 0.70)
    assert (r.chunked_prefill, r.eager, c.device) == (True, True, "npu")
    assert (c.reward.accuracy_weight, c.reward.format_weight) == (0.9, 0.1)
    assert c.data.source.repo == "hiyouga/geometry3k"
    assert c.model.source.repo == "Qwen/Qwen3-VL-30B-A3B-Instruct"
    assert c.ray.env["HCCL_CONNECT_TIMEOUT"] == "5400"
    assert c.ray.env["VLLM_ASCEND_ENABLE_NZ"] == "0"
    assert c.ray.preload["LD_PRELOAD"].endswith("libjemalloc.so.2")


def test_gpu_and_npu_recipes_differ_in_the_machine_only():
    npu, gpu = io.load(CONFIGS / "geo3k.yaml"), io.load(CONFIGS / "geo3k_gpu.yaml")
    for part in ("data", "batch", "algorithm", "reward", "validation", "train"):
        assert getattr(npu, part) == getattr(gpu, part), part
    assert gpu.device == "cuda"
    assert gpu.ray.env == {}
