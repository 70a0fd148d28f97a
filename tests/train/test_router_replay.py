"""Experts that the engine chose, chosen again in training."""

import dataclasses

import pytest
import torch

from dapo.errors import ConfigError, EngineError
from dapo.model.experts import RouterReplay, routers
from dapo.plan.packing import plan_packs
from dapo.rollout.transformers_engine import TransformersEngine
from dapo.train.fsdp_policy import FsdpPolicy
from dapo.types import SamplingParams, TrainBatch, TrainGroup, TrainSequence
from tests.model.tiny import BANNED, CHOICES, EXPERTS, LAYERS, TinyProcessor, make_batch, make_folder
from tests.train.reference import run_config

REPLAY = {"rollout": {"router_replay": True}}


def make_policy(folder, kind, tree=REPLAY):
    return FsdpPolicy(run_config(tree), folder, TinyProcessor(kind), master_dtype=torch.float32)


def gradients(policy, batch):
    """Log-probabilities of the batch in one pack, and gradients of their sum."""
    plan = plan_packs(batch, ranks=1, tokens_per_pack=500)
    (pack,) = plan.updates[0][0]
    policy.network.zero_grad()
    logprobs, _ = policy.network(policy.collate(batch, pack)[0])
    logprobs.sum().backward()
    return logprobs.detach(), {name: p.grad for name, p in policy.network.named_parameters()}


def own_choices(policy, batch):
    """The batch with the experts that the policy itself chooses for it, recorded for every token."""
    plan = plan_packs(batch, ranks=1, tokens_per_pack=500)
    (pack,) = plan.updates[0][0]
    chosen = []
    hooks = [r.register_forward_hook(lambda *a: chosen.append(a[2][2])) for r in routers(policy.model).values()]
    with torch.no_grad():
        policy.network(policy.collate(batch, pack)[0])
    for hook in hooks:
        hook.remove()
    recorded = torch.stack(chosen, 1).to(torch.uint8)  # [N, layers, k], prompts first
    groups, prompt_end = list(batch.groups), 0
    at = len(recorded) - sum(
        len(batch.groups[s.group].sequences[i].response_ids) - 1 for s in pack.segments for i in s.sequences
    )
    for segment in pack.segments:
        group = batch.groups[segment.group]
        start, prompt_end = prompt_end, prompt_end + len(group.prompt.token_ids)
        sequences = []
        for index, sequence in enumerate(group.sequences):
            inputs = len(sequence.response_ids) - 1
            rows = (
                recorded[at : at + inputs]
                if index
                else torch.cat([recorded[start:prompt_end], recorded[at : at + inputs]])
            )
            sequences.append(dataclasses.replace(sequence, experts=rows.numpy().tobytes()))
            at += inputs
        groups[segment.group] = TrainGroup(group.prompt, tuple(sequences))
    return dataclasses.replace(batch, groups=tuple(groups))


@pytest.mark.parametrize("kind", ["moe", "text-moe"])
def test_the_trainers_own_choices_replayed_change_no_bit(kind, tmp_path):
    policy = make_policy(make_folder(tmp_path, kind), kind)
    batch = make_batch(per_update=4, images="none" if kind == "text-moe" else "some")
    recorded = own_choices(policy, batch)
    assert all(s.experts or len(s.response_ids) == 1 for g in recorded.groups for s in g.sequences)
    free, free_gradients = gradients(policy, batch)
    replayed, replayed_gradients = gradients(policy, recorded)
    assert torch.equal(free, replayed)
    assert all(
        gradient is replayed_gradients[name] is None or torch.equal(gradient, replayed_gradients[name])
        for name, gradient in free_gradients.items()
    )


def test_other_choices_give_other_values_and_gradients_and_are_counted(tmp_path):
    policy = make_policy(make_folder(tmp_path, "moe"), "moe")
    batch = own_choices(policy, make_batch(per_update=4))
    logprobs, before = gradients(policy, batch)
    always = bytes([4, 5])

    def rerouted(sequence):
        return dataclasses.replace(sequence, experts=always * (len(sequence.experts) // 2))

    other = dataclasses.replace(
        batch, groups=tuple(TrainGroup(g.prompt, tuple(map(rerouted, g.sequences))) for g in batch.groups)
    )
    policy.routers.take()
    changed, after = gradients(policy, other)
    assert not torch.allclose(logprobs, changed)
    name = next(name for name in before if name.endswith("experts.gate_up_proj"))
    assert before[name][:4].any()
    assert after[name][4:].any()
    tokens = sum(len(s.experts) for g in other.groups for s in g.sequences) // (LAYERS * CHOICES)
    assert (policy.routers.take()[:, 4:] >= tokens).all()


def test_a_step_with_told_experts_trains_with_a_ratio_of_exactly_one(tmp_path):
    batch = make_batch(experts=True)
    plan = plan_packs(batch, ranks=1, tokens_per_pack=64)
    losses = []
    for checkpointing in (False, True):
        policy = make_policy(
            make_folder(tmp_path, "moe"), "moe", REPLAY | {"model": {"gradient_checkpointing": checkpointing}}
        )
        policy.old_logprobs(batch, plan)
        first, second = (policy.update(batch, plan, u).metrics for u in range(2))
        assert first["max_ratio_error"] == 0.0
        losses.append((first["loss"], first["grad_norm"], second["loss"], second["grad_norm"]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["moe", "text-moe"])
def test_what_the_engine_tells_is_what_the_trainer_would_choose(kind, tmp_path):
    """Same weights, float32: the engine's record agrees with the trainer's own choices, and so do values."""
    folder = make_folder(tmp_path, kind)
    engine = TransformersEngine(folder, TinyProcessor(kind), return_routed_experts=True)
    batch = make_batch(groups=3, size=1, images="none" if kind == "text-moe" else "some")
    prompts = [group.prompt for group in batch.groups]
    params = SamplingParams(3, 0.9, 1.0, -1, 9, (7, 11, 13), BANNED, seed=5)
    groups = tuple(
        TrainGroup(p, tuple(TrainSequence(c.token_ids, 1.0, c.logprobs, c.experts) for c in samples))
        for p, samples in zip(prompts, engine.generate(prompts, params), strict=True)
    )
    lengths = [len(s.response_ids) for g in groups for s in g.sequences]
    assert len(set(lengths)) > 1
    for group in groups:
        for index, s in enumerate(group.sequences):
            tokens = len(s.response_ids) - (index > 0)  # the first includes the prompt's last token
            assert len(s.experts) == tokens * LAYERS * CHOICES
    recorded = TrainBatch(groups, (tuple(range(len(groups))),), 0)
    policy = make_policy(folder, kind)
    own = own_choices(policy, recorded)
    same = total = 0
    for ours, theirs in zip(own.groups, recorded.groups, strict=True):
        for a, b in zip(ours.sequences, theirs.sequences, strict=True):
            pairs = zip(a.experts[-len(b.experts) :] if b.experts else b"", b.experts, strict=True)
            agreed = [x == y for x, y in pairs]
            same, total = same + sum(agreed), total + len(agreed)
    assert same > 0.98 * total  # float32 sums in another order may turn a near tie round
    logprobs, _ = gradients(policy, recorded)
    sampled = torch.tensor([x for g in groups for s in g.sequences for x in s.rollout_logprobs])
    assert float((logprobs - sampled).abs().max()) < 1e-4


def test_a_model_without_experts_is_refused(tmp_path):
    folder = make_folder(tmp_path, "dense")
    with pytest.raises(ConfigError, match=r"router_replay=true, but the qwen3_vl .* has no experts"):
        make_policy(folder, "dense")
    with pytest.raises(ConfigError, match="router_replay=true, but the model has no experts"):
        TransformersEngine(folder, TinyProcessor("dense"), return_routed_experts=True)


def test_a_record_that_does_not_fit_is_refused(tmp_path):
    replay = RouterReplay(make_policy(make_folder(tmp_path, "moe"), "moe").model)
    assert (replay.layers, replay.choices, replay.experts) == (LAYERS, CHOICES, EXPERTS)
    row = LAYERS * CHOICES
    assert replay.read(bytes(3 * row), 2).shape == (3, LAYERS, CHOICES)
    assert torch.equal(replay.read(b"", 2), torch.full((2, LAYERS, CHOICES), -1))
    for record in (bytes(row), bytes(2 * row + 1)):
        with pytest.raises(EngineError, match=f"{len(record)} bytes for 2 input tokens"):
            replay.read(record, 2)
    with pytest.raises(EngineError, match="expert 6 of 6"):
        replay.read(bytes([6] * 2 * row), 2)
