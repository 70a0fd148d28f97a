"""Topic 08: sequence balancing, by invariants: coverage, sizes, hard limit, imbalance no worse than the reference's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dapo.errors import DataError
from dapo.plan.partition import Parts, balanced_partition, fill_bins, micro_batches
from tests.parity.cases import Case


def spread(values: Sequence[float], parts: Parts) -> float:
    sums = [sum(values[i] for i in part) for part in parts]
    return max(sums) - min(sums)


def assert_covers(parts: Parts, count: int) -> None:
    assert sorted(i for part in parts for i in part) == list(range(count))


def within(lengths: Sequence[int], parts: Parts, limit: int) -> bool:
    return all(sum(lengths[i] for i in part) <= limit for part in parts)


def workload(length: int) -> int:
    """The reference's cost of a sequence: 24576 per token and 1 per token pair."""
    return 24576 * length + length * length


@pytest.mark.golden("08_seqlen_partition")
def test_partitions_are_no_less_even(case: Case) -> None:
    lengths, k, equal_size = case.inputs["lengths"], case.inputs["k"], case.inputs["equal_size"]
    if "error" in case.out:
        with pytest.raises(DataError):
            balanced_partition(lengths, k, equal_size=equal_size)
        return
    parts = balanced_partition(lengths, k, equal_size=equal_size)
    assert_covers(parts, len(lengths))
    assert len(parts) == k
    assert all(parts)
    if equal_size:
        assert {len(part) for part in parts} == {len(lengths) // k}
    assert spread(lengths, parts) <= case.out["max_minus_min"]


@pytest.mark.golden("08_balance_batch")
def test_ranks_are_no_less_even(case: Case) -> None:
    lengths, ranks = case.inputs["lengths"], case.inputs["dp_size"]
    if "error" in case.out:
        with pytest.raises(DataError):
            balanced_partition(lengths, ranks, equal_size=True)
        return
    parts = balanced_partition(lengths, ranks, equal_size=True)
    assert_covers(parts, len(lengths))
    assert {len(part) for part in parts} == {len(lengths) // ranks}
    metrics = case.out["metrics"]
    reference = metrics["global_seqlen/balanced_max"] - metrics["global_seqlen/balanced_min"]
    assert spread(lengths, parts) <= reference


@pytest.mark.golden("08_dynamic_batch")
def test_micro_batches_keep_the_limit_and_are_no_more_and_no_less_even(case: Case) -> None:
    given, out = case.inputs, case.out
    lengths, limit = given["lengths"], given["max_token_len"]
    options = {"multiple_of": given["num_batches_divided_by"] or 1, "at_least": given["min_num_micro_batch"] or 1}
    # The reference refuses a limit below its padded width; nothing of ours is padded.
    if "error" in out and (limit >= given["padded_width"] or max(lengths) > limit):
        with pytest.raises(DataError):
            micro_batches(lengths, limit, **options)
        return
    costs = [workload(n) for n in lengths]
    parts = micro_batches(lengths, limit, costs=costs, **options)
    assert_covers(parts, len(lengths))
    assert all(parts)
    assert within(lengths, parts, limit)
    assert len(parts) % options["multiple_of"] == 0
    assert len(parts) >= options["at_least"]
    if "error" in out or out["exceeds_limit"]:
        return
    assert len(parts) <= out["num_micro_batches"]
    if len(parts) == out["num_micro_batches"]:
        assert spread(costs, parts) <= max(out["workload"]) - min(out["workload"])


@pytest.mark.golden("08_dynamic_batch_dp")
def test_ranks_agree_on_a_count(case: Case) -> None:
    by_rank, limit, out = case.inputs["lengths_by_rank"], case.inputs["max_token_len"], case.out
    own = [len(micro_batches(lengths, limit)) for lengths in by_rank]
    # A rank with too few sequences gets empty bins (filler packs), where the reference fails.
    same = [fill_bins(lengths, lengths, limit, at_least=max(own)) for lengths in by_rank]
    assert {len(parts) for parts in same} == {max(own)}
    for lengths, parts in zip(by_rank, same, strict=True):
        assert_covers(parts, len(lengths))
        assert within(lengths, parts, limit)
    for lengths, count, reference in zip(by_rank, own, out["indices_own_count"], strict=True):
        if isinstance(reference, list) and within(lengths, reference, limit):
            assert count <= len(reference)
