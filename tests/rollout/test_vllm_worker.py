"""Names and groups of weights on their way into vLLM, and what dead engines leave behind; no vLLM needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dapo.errors import EngineError
from dapo.rollout.vllm_process import WEIGHTS_FILE, remove_stale_shared_memory, weight_files
from dapo.rollout.vllm_worker import check_whole_groups, to_checkpoint_names, to_transformers_name

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


def test_files_hold_at_most_the_limit_and_every_tensor_once() -> None:
    tensors = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate((10, 10, 100, 5, 5, 30))}
    tensors["view"] = tensors["t2"][20:40]  # safetensors refuses shared memory; a copy it takes
    seen: dict[str, torch.Tensor] = {}
    sizes, paths = [], []
    for path in weight_files(tensors.items(), limit=4 * 50):
        assert [Path(p).exists() for p in paths] == [False] * len(paths)
        found = load_file(path)
        assert not set(found) & set(seen)
        seen |= found
        sizes.append(sum(t.nbytes for t in found.values()))
        paths.append(path)
    assert not Path(paths[-1]).exists()
    assert all(torch.equal(seen[name], tensor) for name, tensor in tensors.items())
    assert sizes == [80, 400, 160, 80]


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
