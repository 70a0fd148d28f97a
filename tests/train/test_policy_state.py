"""One process: what a policy saves, resumes from and exports, and what happens when that fails."""

import pytest
import torch

from dapo.errors import CheckpointError
from dapo.train import optim
from tests.model.tiny import make_batch, make_folder
from tests.train.policies import full_disk, make_policy, save, step, weights_of


def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path):
    folder, state = make_folder(tmp_path / "hf", "dense"), tmp_path / "state"
    batches = [make_batch(seed=seed) for seed in (1, 2)]
    policy = make_policy(folder)
    step(policy, batches[0])
    save(policy, state)
    random_numbers = torch.rand(3)
    step(policy, batches[1])
    resumed = make_policy(folder)
    resumed.load(state)
    assert torch.equal(torch.rand(3), random_numbers)
    assert resumed.updates == 2
    step(resumed, batches[1])
    expected = weights_of(policy)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.named_weights())


def test_a_run_without_an_update_so_far_goes_on_to_the_same_bits(tmp_path):
    """As after a first step whose updates were all skipped."""
    folder = make_folder(tmp_path / "hf", "dense")
    policy = make_policy(folder)
    save(policy, tmp_path / "state")
    resumed = make_policy(folder)
    resumed.load(tmp_path / "state")
    expected = make_policy(folder)
    for one in (policy, resumed, expected):
        step(one, make_batch())
    for one in (policy, resumed):
        assert one.updates == 2
        assert all(
            torch.equal(a, b) for (_, a), (_, b) in zip(one.named_weights(), expected.named_weights(), strict=True)
        )


@pytest.mark.parametrize("home", ["meta", "cpu"])
def test_a_loaded_states_update_count_is_where_the_parameters_are(home):
    """There the fused update of accelerators looks for it; `cpu` is the offloaded optimiser, `meta` any accelerator."""
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    optim.make_state(optimizer, torch.device(home))
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert {name: tensor.device.type for name, tensor in state.items()} == {
            "step": "meta",
            "exp_avg": home,
            "exp_avg_sq": home,
        }
        assert state["step"].dtype == torch.float32


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    folder, state = make_folder(tmp_path / "hf", "dense"), tmp_path / "state"
    policy = make_policy(folder)
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        policy.load(tmp_path / "nothing")
    step(policy, make_batch())
    save(policy, state)
    other = make_policy(make_folder(tmp_path / "moe", "moe"), "moe")
    with pytest.raises(CheckpointError, match="does not hold this model's state"):
        other.load(state)
    (part,) = state.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        policy.load(state)


def test_a_state_that_cannot_be_written_is_an_error(tmp_path):
    policy = make_policy(make_folder(tmp_path / "hf", "dense"))
    (tmp_path / "file").write_text("")
    policy.save(tmp_path / "file" / "state")
    with pytest.raises(CheckpointError, match=r"could not be written .*rank 0: NotADirectoryError"):
        policy.written(wait=True)


def test_a_state_written_in_the_background_is_that_of_the_call(tmp_path):
    policy = make_policy(make_folder(tmp_path / "hf", "dense"))
    step(policy, make_batch())
    before = weights_of(policy)
    (tmp_path / "state").mkdir()
    policy.save(tmp_path / "state")
    step(policy, make_batch(seed=1))
    assert policy.written(wait=True)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in policy.named_weights())
    policy.load(tmp_path / "state")
    assert policy.updates == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.named_weights())


def test_a_full_disk_in_the_background_is_reported_when_it_is_asked_for(tmp_path):
    policy = make_policy(make_folder(tmp_path / "hf", "dense"))
    (tmp_path / "state").mkdir()
    with full_disk(20_000):
        policy.save(tmp_path / "state")
        with pytest.raises(CheckpointError, match=r"could not be written to .*File too large"):
            policy.written(wait=True)
    assert policy.written(wait=False)  # said once
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        policy.load(tmp_path / "state")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["dense", "moe", "text", "text-moe"])
def test_an_export_is_a_folder_to_go_on_from(kind, tied, tmp_path):
    policy = make_policy(make_folder(tmp_path / "hf", kind, tied=tied), kind)
    step(policy, make_batch(images="none" if kind.startswith("text") else "all"))
    policy.export(tmp_path / "out")
    assert policy.written(wait=True)  # with the logits of plain transformers compared
    again = make_policy(tmp_path / "out", kind)
    expected = weights_of(policy)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.named_weights())
    assert again.fingerprint() == policy.fingerprint()


def test_an_export_is_that_of_the_call(tmp_path):
    policy = make_policy(make_folder(tmp_path / "hf", "dense"))
    before = weights_of(policy)
    policy.export(tmp_path / "out")
    step(policy, make_batch())
    assert policy.written(wait=True)
    again = make_policy(tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.named_weights())


def test_a_full_disk_while_exporting_is_reported_when_it_is_asked_for(tmp_path):
    policy = make_policy(make_folder(tmp_path / "hf", "dense"))
    with full_disk(20_000):
        policy.export(tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"export could not be written to .*File too large"):
            policy.written(wait=True)
