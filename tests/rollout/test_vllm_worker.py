"""Names and groups of weights on their way into vLLM, and what dead engines leave behind; no vLLM needed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dapo.errors import EngineError
from dapo.rollout.ipc import WEIGHTS_FILE, Opener, SharedMemory
from dapo.rollout.transport import send_weights
from dapo.rollout.vllm_process import process_state_kept, remove_stale_shared_memory
from dapo.rollout.vllm_worker import (
    check_kept_groups,
    check_whole_groups,
    to_checkpoint_names,
    to_transformers_name,
)

LAYER = "model.language_model.layers.3"


def test_experts_go_one_by_one_in_the_right_orientation() -> None:
    gate_up, down = torch.randn(2, 10, 4), torch.randn(2, 4, 5)  # E 2, H 4, I 5
    named = {f"{LAYER}.mlp.experts.gate_up_proj": gate_up, f"{LAYER}.mlp.experts.down_proj": down}
    sent = dict(to_checkpoint_names([*named.items(), ("lm_head.weight", torch.ones(3))]))
    assert torch.equal(sent[f"{LAYER}.mlp.experts.1.gate_proj.weight"], gate_up[1, :5])
    assert torch.equal(sent[f"{LAYER}.mlp.experts.1.up_proj.weight"], gate_up[1, 5:])
    assert torch.equal(sent[f"{LAYER}.mlp.experts.0.down_proj.weight"], down[0])
    assert sent[f"{LAYER}.mlp.experts.0.gate_proj.weight"].data_ptr() == gate_up.data_ptr()  # a view
    assert set(map(to_transformers_name, sent)) == {*named, "lm_head.weight"}
    assert len(sent) == 2 * 3 + 1


def test_dense_down_projections_keep_their_names() -> None:
    name = f"{LAYER}.mlp.down_proj.weight"
    assert [n for n, _ in to_checkpoint_names([(name, torch.ones(2, 2))])] == [name]
    assert to_transformers_name(name) == name


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        ("self_attn.q_proj.weight", r"self_attn\.k_proj\.weight came without q_proj"),
        ("self_attn.k_proj.bias", r"self_attn\.q_proj\.bias came without k_proj"),
        ("mlp.up_proj.weight", r"mlp\.gate_proj\.weight came without up_proj"),
        ("mlp.experts.5.gate_proj.weight", r"experts\.5\.up_proj\.weight came without gate_proj"),
    ],
)
def test_a_partial_group_is_named(part: str, missing: str) -> None:
    attention = [f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
    mlp = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
    experts = [f"mlp.experts.{e}.{p}_proj.weight" for e in (4, 5) for p in ("gate", "up", "down")]
    names = [f"{LAYER}.{name}" for name in [*attention, *mlp, *experts]]
    check_whole_groups([*names, "model.visual.blocks.0.attn.qkv.weight"])
    with pytest.raises(EngineError, match=missing):
        check_whole_groups([n for n in names if n != f"{LAYER}.{part}"])


def test_buckets_arrive_through_shared_memory_and_leave_no_file() -> None:
    tensors = {f"layers.{i}.weight": torch.full((size,), float(i)) for i, size in enumerate((10, 10, 100, 5, 5, 30))}
    tensors["layers.6.weight"] = tensors["layers.2.weight"][20:40]  # a view of another
    opener, seen, places = Opener(), dict[str, torch.Tensor](), []

    def deliver(header: bytes, place: bytes) -> None:
        found = dict(opener.tensors(header, place))
        assert not set(found) & set(seen)
        seen.update(found)
        places.append(place.decode())
        assert [Path(p).exists() for p in places if p] == [False] * (len(places) - 1) + [True] * bool(place)

    send_weights(tensors.items(), SharedMemory(deliver), limit=4 * 50)
    assert len(places) == 5  # four buckets and the end mark
    assert not any(Path(p).exists() for p in places if p)
    assert all(torch.equal(seen[name], tensor) for name, tensor in tensors.items())  # still mapped


def test_a_shared_file_that_is_too_short_is_an_error() -> None:
    opener = Opener()

    def deliver(header: bytes, place: bytes) -> None:
        if place:
            os.truncate(place, 100)
        list(opener.tensors(header, place))

    with pytest.raises(EngineError, match=r"bucket 0 \(from a\.weight on\) holds 100 bytes, its tensors have 4032"):
        send_weights([("a.weight", torch.ones(1000))], SharedMemory(deliver), limit=1)


def test_shared_memory_that_is_full_is_an_error_and_not_a_dead_process() -> None:
    with pytest.raises(EngineError, match=r"MiB of shared memory .*enlarge it"):
        SharedMemory(lambda header, place: None).buffer(2**50)
    assert not list(Path("/dev/shm").glob(f"{WEIGHTS_FILE}{os.getpid()}-*"))


def test_a_module_of_which_a_part_was_kept_is_named() -> None:
    check_kept_groups([f"{LAYER}.self_attn.q_proj.weight"], [f"{LAYER}.self_attn.o_proj.weight"])
    with pytest.raises(EngineError, match=r"q_proj\.weight came without \S+k_proj\.weight.*whole modules"):
        check_kept_groups([f"{LAYER}.self_attn.q_proj.weight"], [f"{LAYER}.self_attn.k_proj.weight"])
    with pytest.raises(EngineError, match=r"norm\.weight came without \S+norm\.bias"):
        check_kept_groups(["model.visual.merger.norm.weight"], ["model.visual.merger.norm.bias"])


def test_only_what_no_living_process_uses_is_removed(tmp_path: Path) -> None:
    dead = 2**22 + 1  # above the kernel's largest process id
    stale = [tmp_path / "-tp:0-[0-1]-cpushm_0", tmp_path / f"{WEIGHTS_FILE}{dead}-abc"]
    living = [tmp_path / f"{WEIGHTS_FILE}{os.getpid()}-abc", tmp_path / "something-else"]
    for file in [*stale, *living]:
        file.write_bytes(b"0" * 4096)
    mapped = tmp_path / "-tp:1-[0-1]-cpushm_0"
    storage = torch.from_file(str(mapped), shared=True, size=1024)
    assert sorted(remove_stale_shared_memory(tmp_path)) == sorted(stale)
    assert all(file.exists() for file in [*living, mapped])
    del storage
    assert remove_stale_shared_memory(tmp_path / "absent") == []


def test_random_numbers_of_an_accelerator_are_put_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    state = [torch.tensor([1])]
    device = SimpleNamespace(get_rng_state=lambda: state[-1], set_rng_state=state.append)
    monkeypatch.setattr(torch, "npu", device, raising=False)
    with process_state_kept("npu"):
        state.append(torch.tensor([2]))  # vLLM seeds every device
    assert device.get_rng_state().item() == 1
