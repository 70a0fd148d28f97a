"""The real policy, killed while its checkpoint is being written beside the training."""

import os
import signal
import sys
import traceback

import pytest
import torch

from dapo.observe.journal import Journal
from dapo.observe.run_folder import RunFolder
from dapo.runtime import checkpoints
from dapo.runtime.checkpoints import Checkpoints
from tests.model.tiny import make_batch, make_folder
from tests.train.policies import make_policy, step, weights_of

WRITES = ("open", "os.mkdir", "os.rename", "shutil.copyfile")


def train_and_die(weights, folder, operation):
    """Checkpoint of step 1, one more step, and SIGKILL before the n-th file operation of the next checkpoint."""
    policy = make_policy(weights)
    saves = Checkpoints(folder, Journal(folder.journal), policy, keep=2)
    step(policy, make_batch())
    saves.begin(1, {}, {})
    saves.finish()
    step(policy, make_batch(seed=1))
    count = 0

    def die(event, arguments):
        nonlocal count
        if event in WRITES and str(folder.checkpoints) in str(arguments):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    saves.begin(2, {}, {})
    while True:  # training goes on until the kill, or until the checkpoint is whole
        step(policy, make_batch(seed=2))
        saves.poll()
        if folder.checkpoint(2).exists():
            os._exit(0)


@pytest.mark.slow
def test_a_policy_killed_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path):
    torch.set_num_threads(1)
    weights = make_folder(tmp_path / "weights", "dense")
    runs = {}
    # All children first: autograd's threads in this process would not live on in them.
    for operation in (2, 8, 14, 1000):
        folder = RunFolder(tmp_path / f"run-{operation}")
        folder.root.mkdir()
        child = os.fork()
        if child == 0:
            try:
                train_and_die(weights, folder, operation)
            finally:
                traceback.print_exc()
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        runs[folder] = os.WIFSIGNALED(status)
    assert list(runs.values()) == [True] * (len(runs) - 1) + [False]
    expected = make_policy(weights)
    step(expected, make_batch())
    wanted = weights_of(expected)
    for folder, killed in runs.items():
        path = checkpoints.newest(folder, pytest.fail)
        assert path == folder.checkpoint(1 if killed else 2)
        policy = make_policy(path / "hf")
        policy.load(path / "state")
        assert policy.updates == 2 * checkpoints.step_of(path)
        if killed:
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in policy.named_weights())
        step(policy, make_batch(seed=1))
