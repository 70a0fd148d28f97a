"""One process: the packed policy against plain transformers, and what it refuses."""

import dataclasses

import pytest
import torch

from dapo.errors import ConfigError
from dapo.plan.packing import plan_packs
from dapo.train import optim
from dapo.train.optim import learning_rate
from dapo.types import Pack, PackPlan
from tests.model.tiny import exact_float64, make_batch, make_folder
from tests.train.policies import make_policy, plan_of, save, step, weights_of
from tests.train.reference import reference_run, run_config


@pytest.mark.parametrize("kind", ["dense", "moe", "text", "text-moe"])
def test_a_step_equals_plain_transformers_in_one_process(kind, tmp_path):
    folder = make_folder(tmp_path, kind)
    config = run_config()
    batch = make_batch(images="none" if kind.startswith("text") else "some")
    expected, weights = reference_run(folder, kind, batch, config)
    policy = make_policy(folder, kind, config, torch.float64)
    with exact_float64():
        metrics = step(policy, batch)
    for found, (loss, norm) in zip(metrics, expected, strict=True):
        assert found["loss"] == pytest.approx(loss, abs=1e-9)
        assert found["grad_norm"] == pytest.approx(norm, abs=1e-9)
    for name, tensor in policy.named_weights():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-9, msg=name)


def test_any_split_into_packs_gives_the_same_update(tmp_path):
    folder = make_folder(tmp_path, "dense")
    batch = make_batch(groups=2, per_update=2)
    (whole,) = plan_packs(batch, ranks=1, tokens_per_pack=500).updates[0][0]
    apart = tuple(Pack((dataclasses.replace(s, sequences=(i,)),), 0) for s in whole.segments for i in s.sequences)
    results = []
    for packs in ((whole,), (*apart, Pack((), 0))):
        policy = make_policy(folder, dtype=torch.float64)
        plan = PackPlan(((tuple(packs),),))
        with exact_float64():
            policy.old_logprobs(batch, plan)
            metrics = policy.update(batch, plan, 0).metrics
        results.append((metrics, weights_of(policy)))
    (one, one_weights), (many, many_weights) = results
    for name in ("loss", "grad_norm", "tokens", "entropy"):
        assert many[name] == pytest.approx(one[name], abs=1e-12)
    for name, tensor in one_weights.items():
        torch.testing.assert_close(many_weights[name], tensor, rtol=0, atol=1e-12)


def test_the_first_updates_ratio_is_exactly_one_and_later_ones_move(tmp_path):
    policy = make_policy(make_folder(tmp_path, "dense"))
    first, second = step(policy, make_batch())
    assert first["max_ratio_error"] == 0.0
    assert second["max_ratio_error"] > 0.0


def test_stored_old_logprobs_of_the_first_update_also_give_a_ratio_of_exactly_one(tmp_path):
    config = run_config({"algorithm": {"kl": {"reward_coef": 0.1}}})
    policy = make_policy(make_folder(tmp_path, "dense"), config=config)
    batch = make_batch()
    plan = plan_of(batch)
    old = policy.old_logprobs(batch, plan)
    reference = policy.reference_logprobs(batch, plan)
    assert old == reference  # nothing is trained yet
    assert all(
        len(values) == len(sequence.response_ids)
        for group, made in zip(batch.groups, old.values, strict=True)
        for sequence, values in zip(group.sequences, made, strict=True)
    )
    assert policy.update(batch, plan, 0).metrics["max_ratio_error"] == 0.0


def test_a_probe_of_the_current_weights_covers_all_sequences_and_leaves_the_step_alone(tmp_path):
    policy = make_policy(make_folder(tmp_path, "dense"))
    batch = make_batch()
    plan = plan_of(batch)
    policy.old_logprobs(batch, plan)
    policy.update(batch, plan, 0)
    probe = policy.logprobs(batch, plan).values
    lengths = [[len(values) for values in group] for group in probe]
    assert lengths == [[len(s.response_ids) for s in group.sequences] for group in batch.groups]
    second = policy.update(batch, plan, 1).metrics
    assert second["max_ratio_error"] > 0.0  # against the old weights, not against those of the probe


def test_the_kl_term_pulls_back_to_the_reference(tmp_path):
    config = run_config({"algorithm": {"kl": {"loss_coef": 1.0}}})
    policy = make_policy(make_folder(tmp_path, "dense"), config=config)
    batch = make_batch()
    plan = plan_of(batch)
    policy.old_logprobs(batch, plan)
    policy.reference_logprobs(batch, plan)
    first, second = (policy.update(batch, plan, u).metrics for u in range(2))
    assert first["kl_loss"] == 0.0
    assert second["kl_loss"] > 0.0


def test_another_plan_than_that_of_the_old_logprobs_is_refused(tmp_path):
    policy = make_policy(make_folder(tmp_path, "dense"))
    batch = make_batch()
    plan = plan_of(batch)
    policy.old_logprobs(batch, plan)
    policy.update(batch, plan, 0)
    other = plan_packs(batch, ranks=1, tokens_per_pack=40)
    with pytest.raises(AssertionError, match="same plan"):
        policy.update(batch, other, 1)


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path):
    policy = make_policy(make_folder(tmp_path, "dense"))
    batch = make_batch(per_update=4)
    groups = [dataclasses.replace(g, sequences=tuple(_endless(s) for s in g.sequences)) for g in batch.groups]
    before = weights_of(policy)
    (metrics,) = step(policy, dataclasses.replace(batch, groups=tuple(groups)))
    assert metrics["skipped"] == 1.0
    assert policy.updates == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.named_weights())
    assert step(policy, batch)[0]["skipped"] == 0.0


def test_an_update_without_a_trained_token_changes_nothing(tmp_path):
    policy = make_policy(make_folder(tmp_path, "dense"))
    batch = make_batch(per_update=4)
    step(policy, batch)  # from here on AdamW has momentum
    masked = [
        dataclasses.replace(g, sequences=tuple(dataclasses.replace(s, trained=False) for s in g.sequences))
        for g in batch.groups
    ]
    before = weights_of(policy)
    for metrics in step(policy, dataclasses.replace(batch, groups=tuple(masked))):
        assert (metrics["empty_update"], metrics["skipped"]) == (1.0, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.named_weights())


def test_a_forward_pass_that_is_not_finite_changes_nothing(tmp_path):
    policy = make_policy(make_folder(tmp_path, "dense"))
    with torch.no_grad():
        policy.network.model.lm_head.weight[0, 0] = float("inf")
    before = weights_of(policy)
    for metrics in step(policy, make_batch()):
        assert metrics["skipped"] == 1.0
    assert policy.updates == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.named_weights())


def test_training_that_computes_something_else_than_the_log_prob_pass_is_noticed(tmp_path):
    policy = make_policy(make_folder(tmp_path, "moe"), "moe")
    attention = policy.network.text.layers[0].self_attn
    attention.register_forward_hook(lambda _, __, out: (out[0] * (1 + 1e-6 * torch.is_grad_enabled()), *out[1:]))
    with pytest.raises(AssertionError, match="training computes something else than the log-prob pass"):
        step(policy, make_batch())


def _endless(sequence):
    return dataclasses.replace(sequence, advantage=float("inf"), trained=True)


def test_an_update_without_a_trained_token_has_loss_zero(tmp_path):
    policy = make_policy(make_folder(tmp_path, "dense"))
    batch = make_batch(per_update=4)
    groups = [
        dataclasses.replace(g, sequences=tuple(dataclasses.replace(s, trained=False) for s in g.sequences))
        for g in batch.groups
    ]
    (metrics,) = step(policy, dataclasses.replace(batch, groups=tuple(groups)))
    assert (metrics["loss"], metrics["grad_norm"], metrics["empty_update"]) == (0.0, 0.0, 1.0)


def test_router_load_is_reported_for_a_moe_and_only_for_one(tmp_path):
    moe = step(make_policy(make_folder(tmp_path / "moe", "moe"), "moe"), make_batch())
    assert all(1.0 <= metrics["router_max_load"] <= 6.0 for metrics in moe)
    assert all(0.0 <= metrics["router_idle"] < 1.0 for metrics in moe)
    dense = step(make_policy(make_folder(tmp_path / "dense", "dense")), make_batch())
    assert not any("router_max_load" in metrics for metrics in dense)


def test_warm_up_counts_updates():
    config = run_config({"model": {"optimizer": {"lr": 4.0, "warmup_updates": 4}}}).model.optimizer
    assert [learning_rate(config, update) for update in (1, 2, 4, 9)] == [1.0, 2.0, 4.0, 4.0]


def test_a_frozen_vision_tower_stays_as_it_is(tmp_path):
    policy = make_policy(make_folder(tmp_path, "dense"), config=run_config({"model": {"freeze_vision": True}}))
    before = weights_of(policy)
    step(policy, make_batch())
    changed = {name for name, tensor in policy.named_weights() if not torch.equal(tensor, before[name])}
    assert changed
    assert not [name for name in changed if ".visual." in name]


def test_gradient_checkpointing_gives_the_same_update(tmp_path):
    folder = make_folder(tmp_path, "dense")
    results = []
    for wanted in (False, True):
        policy = make_policy(folder, config=run_config({"model": {"gradient_checkpointing": wanted}}))
        step(policy, make_batch())
        results.append(weights_of(policy))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


@pytest.mark.parametrize("wanted", [False, True])
def test_gradient_checkpointing_is_always_on_in_the_vision_tower(wanted, tmp_path):
    policy = make_policy(
        make_folder(tmp_path, "dense"), config=run_config({"model": {"gradient_checkpointing": wanted}})
    )
    runs = {"vision": 0, "text": 0}

    def count(module, name):
        def hook(*_):
            runs[name] += 1

        module.register_forward_hook(hook)

    count(policy.network.visual.blocks[0].attn, "vision")
    count(policy.network.text.layers[0].self_attn, "text")
    batch = make_batch(per_update=4)
    policy.update(batch, plan_of(batch), 0)
    packs = len(plan_of(batch).updates[0][0])
    assert runs == {"vision": 2 * packs, "text": (1 + wanted) * packs}  # once more in the backward pass


def test_another_number_of_processes_than_configured_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="world_size=2, but 1 training processes"):
        make_policy(make_folder(tmp_path, "text"), "text", run_config(world_size=2))


def test_offloaded_moments_give_the_same_bits_and_stream_in_parts(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, "dense")
    monkeypatch.setattr(optim, "STREAM_BYTES", 20_000)
    policies = [make_policy(folder, config=run_config(offload_optimizer=offloaded)) for offloaded in (False, True)]
    # A device of another name than the moments' home, so that they do travel.
    monkeypatch.setattr(policies[1], "_moments_home", torch.device("cpu", 0))
    for policy in policies:
        step(policy, make_batch())
        step(policy, make_batch(seed=1))
    assert len(policies[0].optimizer.param_groups) == 2
    assert len(policies[1].optimizer.param_groups) > 4
    expected = weights_of(policies[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in policies[1].named_weights())


def test_bfloat16_compute_stays_near_float32_and_keeps_float32_weights(tmp_path):
    folder = make_folder(tmp_path, "dense")
    batch = make_batch(images="all", per_update=4)
    entropies = []
    for dtype in ("float32", "bfloat16"):
        policy = make_policy(folder, config=run_config({"model": {"compute_dtype": dtype}}))
        entropies.append(step(policy, batch)[0]["entropy"])
        assert all(p.dtype == torch.float32 for p in policy.model.parameters())
        assert {t.dtype for _, t in policy.named_weights()} == {getattr(torch, dtype)}
        policy.close()
    assert entropies[1] == pytest.approx(entropies[0], abs=0.05)
    assert entropies[1] != entropies[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_parameters_train_and_are_saved_as_others_are(tmp_path, checkpointing):
    """One process, sharded for the moves; on CPU nothing moves, but all of FSDP's offloading runs."""
    folder = make_folder(tmp_path / "hf", "dense")
    results = []
    for offloaded in (False, True):
        tree = {"model": {"gradient_checkpointing": checkpointing}}
        policy = make_policy(folder, config=run_config(tree, offload_parameters=offloaded))
        step(policy, make_batch())
        save(policy, tmp_path / f"state-{offloaded}")
        step(policy, make_batch(seed=1))
        policy.load(tmp_path / "state-False")  # also by the policy that keeps its own elsewhere
        step(policy, make_batch(seed=2))
        results.append(weights_of(policy))
        policy.close()
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=0, atol=2e-5, msg=name)
