"""Two gloo ranks give what one process of plain transformers gives; their state and export go anywhere."""

import dataclasses

import pytest
import torch

from dapo.model.load import load_model
from tests.train.ranks import Case, run_ranks
from tests.train.reference import reference_run, run_config

# Odd numbers, so that ranks get unequal packs; half of the prompts have images, so that some packs have none.
BATCH = {"groups": 5, "per_update": 3}
REPLAY = {"rollout": {"router_replay": True}}
CASES = {
    "fsdp": Case("dense", batch=BATCH, save="two", export="export"),
    "resumed": Case("dense", batch=BATCH, load="two"),
    "hsdp": Case("moe", parallel={"fsdp_size": 1}, batch=BATCH),
    "tied": Case("text", tied=True, batch=BATCH),
    "text-only": Case("dense", batch={**BATCH, "images": "none"}),
    "checkpointing": Case("dense", {"model": {"gradient_checkpointing": True}}, batch=BATCH),
    "offload": Case("dense", parallel={"offload_parameters": True}, batch=BATCH, save="offloaded"),
    "ulysses": Case("dense", parallel={"sequence_parallel": 2}, batch=BATCH),
    "ulysses moe": Case("moe", {"model": {"gradient_checkpointing": True}}, {"sequence_parallel": 2}, BATCH),
    "replay": Case("moe", REPLAY, batch={**BATCH, "experts": True}),
    "replay, ulysses": Case(
        "moe",
        {**REPLAY, "model": {"gradient_checkpointing": True}},
        {"sequence_parallel": 2},
        {**BATCH, "experts": True},
    ),
    "one piece": Case("dense", batch=BATCH, tokens_per_pack=40, min_group_bytes=2**24),
    "one piece, hsdp": Case("moe", parallel={"fsdp_size": 1}, batch=BATCH, tokens_per_pack=40, min_group_bytes=2**24),
    "bfloat16": Case("dense", {"model": {"compute_dtype": "bfloat16"}}, batch=BATCH, dtype=torch.float32),
    "filler": Case("dense", batch={"groups": 1, "size": 1, "per_update": 1}),
}

# Weights move in proportion to the gradient, not by its sign as AdamW's first updates do: they show its every bit.
PROPORTIONAL = {"model": {"gradient_checkpointing": True, "optimizer": {"lr": 1.0, "eps": 1.0}}}
SPLIT = {
    "split, fsdp, ulysses": Case("dense", PROPORTIONAL, {"sequence_parallel": 2}, BATCH, split_attention=True),
    "split, hsdp, ulysses": Case(
        "moe", PROPORTIONAL, {"fsdp_size": 2, "sequence_parallel": 2}, BATCH, split_attention=True
    ),
    "split, apart": Case(
        "text", PROPORTIONAL, {"sequence_parallel": 4}, BATCH, split_attention=True, share_prefix=False
    ),
}

# Of two ranks, and of four; and what four ranks make of them.
SAVED_BY_TWO = {
    "fsdp": Case("dense", batch=BATCH, save="two fsdp"),
    "hsdp": Case("moe", parallel={"fsdp_size": 1}, batch=BATCH, save="two hsdp"),
}
SAVED_BY_FOUR = {
    "fsdp, ulysses": Case("dense", parallel={"sequence_parallel": 2}, batch=BATCH, save="four fsdp"),
    "hsdp": Case("moe", parallel={"fsdp_size": 2}, batch=BATCH, save="four hsdp"),
}
LOADED = {
    "2 to 4": Case("dense", batch=BATCH, load="two fsdp"),
    "2 to 4, sp 1 to 4": Case("dense", parallel={"sequence_parallel": 4}, batch=BATCH, load="two fsdp"),
    "2 to 4, fsdp to hsdp": Case("dense", parallel={"fsdp_size": 2}, batch=BATCH, load="two fsdp"),
    "2 to 4, hsdp to fsdp": Case("moe", batch=BATCH, load="two hsdp"),
    "fsdp to hsdp, sp 2 to 1": Case("dense", parallel={"fsdp_size": 2}, batch=BATCH, load="four fsdp"),
    "hsdp to fsdp, sp 1 to 2": Case("moe", parallel={"sequence_parallel": 2}, batch=BATCH, load="four hsdp"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(root):
    return run_ranks(2, CASES, root)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plain])
def test_two_ranks_equal_plain_transformers_in_one_process(name, results, root):
    case = CASES[name]
    expected, weights = reference_run(case.make_folder(root), case.kind, case.make_batch(), run_config())
    compare(results[name], expected, weights, 1e-9)


def compare(results, expected, weights, tolerance):
    """Every rank's updates and weights with (loss, gradient norm) of each update and the weights after them."""
    for result in results:
        for found, (loss, norm) in zip(result["updates"], expected, strict=True):
            assert found["loss"] == pytest.approx(loss, abs=tolerance)
            assert found["grad_norm"] == pytest.approx(norm, abs=tolerance)
        for name, tensor in result["weights"].items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=tolerance, msg=name)


def test_all_ranks_agree_on_metrics_and_fingerprint(results):
    for first, second in results.values():
        assert first["updates"] == second["updates"]
        assert first["fingerprint"] == second["fingerprint"]
        for name, total in first["fingerprint"].items():
            assert total == pytest.approx(float(first["weights"][name].double().abs().sum()), rel=1e-12)


def test_weights_are_handed_over_in_the_compute_dtype(results):
    for first, second in zip(*(r["weights"].values() for r in results["bfloat16"]), strict=True):
        assert first.dtype == torch.bfloat16
        assert torch.equal(first, second)


def test_each_sequences_old_logprobs_come_from_one_rank(results):
    case, (first, second) = CASES["fsdp"], results["fsdp"]
    batch = case.make_batch()
    later = set(batch.updates[1])
    for index, group in enumerate(batch.groups):
        for s, sequence in enumerate(group.sequences):
            lengths = sorted(len(r["old"][index][s]) for r in (first, second))
            # Of the first update, only one pack of each rank.
            assert lengths == [0, len(sequence.response_ids)] or (index not in later and lengths == [0, 0])


def test_a_filler_pack_is_among_the_cases(results):
    assert any(0 in packs for packs in results["filler"][0]["packs"])


def test_a_checkpoint_of_two_ranks_goes_on_in_one_process_as_on_two(results, root):
    # In a process of its own too: Adam makes a visible difference of one rounding where a gradient is nearly zero, and
    # this process has what other tests left behind (threads, vLLM's settings).
    [alone] = run_ranks(1, {"alone": Case("dense", batch=BATCH, load="two")}, root)["alone"]
    for result in results["resumed"]:
        assert result["count"] == alone["count"] == 4
        for name, tensor in result["weights"].items():
            torch.testing.assert_close(tensor, alone["weights"][name], rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def continued(root):
    run_ranks(2, SAVED_BY_TWO, root)
    return run_ranks(4, SAVED_BY_FOUR | LOADED, root)


@pytest.fixture(scope="module")
def uninterrupted(root):
    """Two steps of plain transformers in one process, per kind of model."""
    return {
        case.kind: reference_run(case.make_folder(root), case.kind, case.make_batch(), run_config(), steps=2)
        for case in SAVED_BY_TWO.values()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_a_checkpoint_goes_on_in_another_layout_as_if_never_interrupted(name, continued, uninterrupted):
    compare(continued[name], *uninterrupted[LOADED[name].kind], 1e-9)
    assert {result["count"] for result in continued[name]} == {4}


@pytest.fixture(scope="module")
def split(root):
    return run_ranks(4, SPLIT, root)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_ragged_kernels_under_ulysses_give_the_gradients_of_plain_transformers(name, split, root):
    case = SPLIT[name]
    compare(
        split[name],
        *reference_run(case.make_folder(root), case.kind, case.make_batch(), run_config(PROPORTIONAL)),
        1e-10,
    )


def test_replayed_experts_are_the_same_on_any_number_of_ranks(results, root):
    case = dataclasses.replace(CASES["replay"], share_prefix=False)
    [alone] = run_ranks(1, {"replay alone": case}, root)["replay alone"]
    for name in ("replay", "replay, ulysses"):
        for result in results[name]:
            for found, expected in zip(result["updates"], alone["updates"], strict=True):
                assert found["loss"] == pytest.approx(expected["loss"], abs=1e-9)
                assert found["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-9)
            for tensor_name, tensor in result["weights"].items():
                torch.testing.assert_close(tensor, alone["weights"][tensor_name], rtol=0, atol=1e-9, msg=tensor_name)


def test_an_export_of_two_ranks_holds_the_trained_weights(results, root):
    loaded = load_model(root / "export", device=torch.device("cpu"), dtype=torch.float64)
    for name, tensor in loaded.named_parameters():
        assert torch.equal(tensor, results["fsdp"][0]["weights"][name]), name
