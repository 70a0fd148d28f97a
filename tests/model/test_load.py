"""Loading: equal to transformers' own, and clear about what is wrong with a folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dapo.errors import WeightsError
from dapo.model.linear import PatchProjection
from dapo.model.load import load_model
from tests.model.tiny import make_folder

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["dense", "moe", "text", "text-moe"])
def test_weights_and_buffers_equal_those_of_transformers(kind, tied, tmp_path):
    folder = make_folder(tmp_path, kind, tied=tied)
    ours = load_model(folder, device=CPU)
    auto = AutoModelForCausalLM if kind.startswith("text") else AutoModelForImageTextToText
    plain = auto.from_pretrained(folder, dtype=torch.float32)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for (name, found), (_, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(found, expected), name
    for (name, found), (_, expected) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied


def test_weights_in_several_files_are_found_by_their_index(tmp_path):
    folder = make_folder(tmp_path, "text")
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    files = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, part in files.items():
        save_file({n: state[n] for n in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, part in files.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_model(folder, device=CPU).model.norm.weight, state["model.norm.weight"])
    (folder / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"not there: b\.safetensors"):
        load_model(folder, device=CPU)


def test_a_missing_tensor_is_named(tmp_path):
    folder = make_folder(tmp_path, "dense")
    state = load_file(folder / "model.safetensors")
    del state["model.visual.merger.norm.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"no tensor model\.visual\.merger\.norm\.weight"):
        load_model(folder, device=CPU)


def test_weights_of_another_size_are_refused(tmp_path):
    folder = make_folder(tmp_path, "text")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = torch.zeros(64, 33)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"lm_head\.weight .* has shape \[64, 33\], config\.json asks for \[64, 32\]"
    ):
        load_model(folder, device=CPU)


def test_a_truncated_file_is_refused(tmp_path):
    folder = make_folder(tmp_path, "text")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_model(folder, device=CPU)


def test_folders_that_hold_no_model_we_train_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_model(tmp_path, device=CPU)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(WeightsError, match=r"'gpt2' model; this trainer knows qwen3_vl"):
        load_model(tmp_path, device=CPU)


def test_a_missing_expert_is_named(tmp_path):
    folder = make_folder(tmp_path, "text-moe")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"no tensor model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight"):
        load_model(folder, device=CPU)


def test_patches_are_projected_by_a_product_that_equals_the_convolution(tmp_path):
    model = load_model(make_folder(tmp_path, "dense"), device=CPU, dtype=torch.float64)
    projection = model.model.visual.patch_embed.proj
    assert isinstance(projection, PatchProjection)
    plain = nn.Conv3d(
        projection.in_channels, projection.out_channels, projection.kernel_size, projection.kernel_size
    ).double()
    plain.load_state_dict(projection.state_dict())
    patches = torch.randn(6, projection.in_channels, *projection.kernel_size, dtype=torch.float64)
    results = [layer(patches).flatten(1) for layer in (projection, plain)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    for result in results:
        result.square().sum().backward()
    for ours, theirs in zip(projection.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-11)
