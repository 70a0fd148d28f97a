"""Which devices there are, and what is said where one is missing."""

import importlib.machinery
import importlib.util
import os

import pytest
import torch

from dapo import device
from dapo.errors import EnvironmentCheckError


@pytest.fixture(autouse=True)
def _forget_findings():
    device._npu_missing.cache_clear()
    device._cuda_missing.cache_clear()
    yield
    device._npu_missing.cache_clear()
    device._cuda_missing.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without accelerators")
def test_a_machine_without_accelerators_is_a_cpu():
    assert device.resolve("auto") == "cpu"
    assert device.torch_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without accelerators")
def test_a_named_device_that_is_missing_says_why_and_what_is_here():
    with pytest.raises(EnvironmentCheckError, match=r"device=npu is not usable: .*torch_npu.*This machine has: cpu"):
        device.resolve("npu")
    with pytest.raises(EnvironmentCheckError, match=r"device=cuda is not usable"):
        device.resolve("cuda")


def test_a_kind_of_device_that_does_not_exist_is_refused():
    with pytest.raises(EnvironmentCheckError, match="'tpu' is not one of auto, cpu, cuda, npu"):
        device.resolve("tpu")


def test_torch_npu_without_a_driver_is_no_npu_and_is_kept_from_breaking_torch(monkeypatch):
    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("torch_npu", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "torch_npu" else find(name, *a))
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    assert device.resolve("auto") != "npu"
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    with pytest.raises(EnvironmentCheckError, match=r"no device node /dev/davinci"):
        device.resolve("npu")


def test_waiting_for_a_cpu_and_freeing_its_cache_are_nothing():
    device.release_cached_memory(torch.device("cpu"))
    device.synchronize(torch.device("cpu"))


def test_threads_are_set_on_purpose():
    before = torch.get_num_threads()
    device.set_threads(2)
    assert torch.get_num_threads() == 2
    device.set_threads(before)
