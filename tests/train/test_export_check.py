"""What an export's comparison must find: each of these folders has the sums of the trained weights, and loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo.errors import CheckpointError
from dapo.model.tensors import checksum
from dapo.train import export, export_check, weights
from dapo.train.snapshot import take
from tests.model.tiny import make_batch, make_folder
from tests.train.policies import make_policy, step
from tests.train.reference import run_config

QUERY = "model.language_model.layers.1.self_attn.q_proj.weight"
GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"


def snapshot_of(tmp_path, kind, **sizes):
    policy = make_policy(make_folder(tmp_path / "hf", kind, **sizes), kind)
    return take(policy.network, policy.compute_dtype, policy.ranks)


def write(tmp_path, snapshot):
    export.write(tmp_path / "out", tmp_path / "hf", snapshot)
    return tmp_path / "out"


def corrupt(folder, change):
    """Change the tensors of a written folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edit(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("square", [False, True])
def test_experts_that_are_not_transposed(square, tmp_path):
    """plain transformers would load them; vLLM would not."""
    snapshot = snapshot_of(tmp_path, "moe", **({"expert_size": 16} if square else {}))
    folder = write(tmp_path, snapshot)

    def untransposed(tensors):
        tensors[GATE_UP] = tensors[GATE_UP].transpose(1, 2)

    corrupt(folder, untransposed)
    with pytest.raises(CheckpointError, match=f"{GATE_UP} " + ("reads back" if square else "has shape")):
        export_check.compare(folder, snapshot)


def test_permuted_rows(tmp_path):
    snapshot = snapshot_of(tmp_path, "dense")
    folder = write(tmp_path, snapshot)

    def permuted(tensors):
        tensors[QUERY] = tensors[QUERY].flip(0)

    corrupt(folder, permuted)
    with pytest.raises(CheckpointError, match=f"{QUERY} reads back with other values"):
        export_check.compare(folder, snapshot)


def test_rows_gathered_in_another_order(tmp_path, monkeypatch):
    policy = make_policy(make_folder(tmp_path / "hf", "dense"))
    honest = weights.whole_tensors

    def permuted(model, dtype):
        return ((name, tensor.flip(0) if name == QUERY else tensor) for name, tensor in honest(model, dtype))

    monkeypatch.setattr(weights, "whole_tensors", permuted)
    policy.export(tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"{QUERY} was not gathered as the shards of ranks \[0\] hold it"):
        policy.written(wait=True)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_tied_in_one_and_not_in_the_other(tied, tmp_path):
    """The files are right, config.json is not: transformers makes another head for one, engines tie the other."""
    snapshot = snapshot_of(tmp_path, "text", tied=tied)
    folder = write(tmp_path, snapshot)
    edit(folder / "config.json", lambda config: config.update(tie_word_embeddings=not tied))
    with pytest.raises(CheckpointError, match=f"tie_word_embeddings={not tied}, the trained model's is {tied}"):
        export_check.compare(folder, snapshot)


def test_a_tied_head_that_is_another_in_the_files(tmp_path):
    snapshot = snapshot_of(tmp_path, "text", tied=True)
    folder = write(tmp_path, snapshot)
    corrupt(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)}))
    with pytest.raises(CheckpointError, match=r"holds lm_head\.weight, which the model does not have"):
        export_check.compare(folder, snapshot)


def test_tensors_that_are_missing_or_too_many_or_in_another_file_than_the_index_says(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FILE_BYTES", 20_000)
    snapshot = snapshot_of(tmp_path, "text")
    folder = write(tmp_path, snapshot)
    first, *_, last = sorted(folder.glob("*.safetensors"))
    moved = load_file(last)
    edit(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update(dict.fromkeys(moved, first.name)),
    )
    with pytest.raises(CheckpointError, match="does not say which file"):
        export_check.compare(folder, snapshot)
    last.unlink()
    with pytest.raises(CheckpointError, match="are missing"):
        export_check.compare(folder, snapshot)
    save_file({"extra": torch.zeros(1)}, last)
    with pytest.raises(CheckpointError, match="holds extra, which the model does not have"):
        export_check.compare(folder, snapshot)


def test_of_a_deep_model_plain_transformers_loads_two_layers(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(export_check, "_LAYERS", 1)
    snapshot = snapshot_of(tmp_path, "moe")
    with caplog.at_level("INFO"):
        folder = write(tmp_path, snapshot)
    assert "bit for bit" in caplog.text
    assert "LOAD REPORT" not in caplog.text
    edit(folder / "config.json", lambda config: config["text_config"].update(num_key_value_heads=1))
    with pytest.raises(CheckpointError, match="plain transformers does not load it"):
        export_check.compare(folder, snapshot)


def test_bfloat16_is_exact_though_sums_in_float32_are_not(tmp_path):
    """Accelerators add up in float32: no sum of theirs is near enough to a sum in float64 to be compared with it."""
    policy = make_policy(
        make_folder(tmp_path / "hf", "dense"), config=run_config({"model": {"compute_dtype": "bfloat16"}})
    )
    step(policy, make_batch())
    policy.export(tmp_path / "out")
    assert policy.written(wait=True)
    policy.close()


def test_the_comparison_draws_no_random_number(tmp_path):
    snapshot = snapshot_of(tmp_path, "dense", tied=True)
    before = checksum(torch.get_rng_state())
    write(tmp_path, snapshot)
    assert checksum(torch.get_rng_state()) == before
