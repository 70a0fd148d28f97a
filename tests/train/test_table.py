"""Every way to spread and to pack the same step agrees with one process of plain transformers, in float64."""

from functools import cache
from itertools import product

import pytest
import torch

from tests.train.ranks import Case, run_ranks
from tests.train.reference import reference_run, run_config

BATCH = {"groups": 4, "per_update": 2, "size": 3}
KINDS = ("dense", "moe", "text", "text-moe")
EXTRAS = {
    "plain": {},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "offload": {"model": {"parallel": {"offload_optimizer": True}}},
    "offload all": {"model": {"gradient_checkpointing": True, "parallel": {"offload_parameters": True}}},
}


def table(world: int) -> dict[str, Case]:
    """All combinations that this number of ranks can be arranged in."""
    sharding = {"fsdp": {}} if world == 1 else {"fsdp": {}, "hsdp": {"fsdp_size": world // 2}}
    cases = {}
    for sp, shard, shared, kind, extra in product((1, 2, 4), sharding, (True, False), KINDS, EXTRAS):
        if world % sp == 0:
            name = f"{shard} sp{sp} {'shared' if shared else 'packed'} {kind} {extra}"
            parallel = sharding[shard] | {"sequence_parallel": sp}
            cases[name] = Case(kind, EXTRAS[extra], parallel, BATCH, share_prefix=shared)
    return cases


SLOW = {
    1: ("fsdp sp1 packed dense plain", "fsdp sp1 shared dense offload all", "fsdp sp1 shared moe checkpointing"),
    2: ("fsdp sp1 packed dense offload", "hsdp sp1 shared text-moe plain", "fsdp sp2 packed moe checkpointing"),
    4: (
        "fsdp sp1 shared dense plain",
        "hsdp sp1 packed moe checkpointing",
        "fsdp sp2 shared dense checkpointing",
        "hsdp sp2 packed text plain",
        "fsdp sp4 shared moe plain",
        "hsdp sp4 packed dense offload",
        "hsdp sp2 shared moe offload all",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_selected_layouts_equal_plain_transformers(world, tmp_path):
    cases = table(world)
    compare({name: cases[name] for name in SLOW[world]}, world, tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_layout_equals_plain_transformers(world, tmp_path):
    compare(table(world), world, tmp_path)


def compare(cases, world, root):
    results = run_ranks(world, cases, root)

    @cache
    def expected(kind):
        case = next(c for c in cases.values() if c.kind == kind)
        return reference_run(case.make_folder(root), kind, case.make_batch(), run_config())

    references = {case.kind: expected(case.kind) for case in cases.values()}
    for name, case in cases.items():
        updates, weights = references[case.kind]
        for result in results[name]:
            for found, (loss, norm) in zip(result["updates"], updates, strict=True):
                assert found["loss"] == pytest.approx(loss, abs=1e-9), name
                assert found["grad_norm"] == pytest.approx(norm, abs=1e-9), name
            for tensor_name, tensor in result["weights"].items():
                torch.testing.assert_close(
                    tensor, weights[tensor_name], rtol=0, atol=1e-9, msg=f"{name}: {tensor_name}"
                )
