"""A policy in one process, and what tests do with it."""

import contextlib
import resource

import torch

from dapo.plan.packing import plan_packs
from dapo.train.fsdp_policy import FsdpPolicy
from dapo.types import PackPlan, TrainBatch
from tests.model.tiny import TinyProcessor
from tests.train.reference import run_config


def make_policy(folder, kind="dense", config=None, dtype=torch.float32):
    return FsdpPolicy(config or run_config(), folder, TinyProcessor(kind, dtype), master_dtype=dtype)


def plan_of(batch: TrainBatch) -> PackPlan:
    return plan_packs(batch, ranks=1, tokens_per_pack=64)


def step(policy, batch):
    plan = plan_of(batch)
    policy.old_logprobs(batch, plan)
    return [policy.update(batch, plan, u).metrics for u in range(len(batch.updates))]


def save(policy, folder):
    folder.mkdir()
    policy.save(folder)
    assert policy.written(wait=True)


@contextlib.contextmanager
def full_disk(limit):
    """No file may grow beyond `limit` bytes: the kernel refuses the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def weights_of(policy):
    return {name: tensor.clone() for name, tensor in policy.named_weights()}
