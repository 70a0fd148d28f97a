"""The NPU repairs, on stand-ins that behave like vllm-ascend's source."""

from __future__ import annotations

import os

import pytest
import torch
from packaging.version import Version
from torch import nn

from dapo.errors import EnvironmentCheckError
from dapo.rollout import ascend


class Runner:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_model(self) -> nn.Module:
        return self.model


class Worker023:
    """Wakes up like NPUWorker of 0.23: expert weights become transposed views of themselves."""

    def __init__(self, model: nn.Module) -> None:
        self.model_runner = Runner(model)
        self.tags: object = None

    def wake_up(self, tags: object = None) -> None:
        self.tags = tags
        for name in ("w13_weight", "w2_weight"):
            turned = getattr(self.model_runner.model.experts, name).transpose(1, 2)
            setattr(self.model_runner.model.experts, name, nn.Parameter(turned, requires_grad=False))


def expert_model() -> nn.Module:
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.w13_weight = nn.Parameter(torch.randn(2, 6, 4), requires_grad=False)
    model.experts.w2_weight = nn.Parameter(torch.randn(2, 4, 3), requires_grad=False)
    return model


def test_experts_keep_their_layout_through_sleep() -> None:
    worker = Worker023(expert_model())
    before = worker.model_runner.model.experts.w13_weight
    ascend.keep_expert_layout_on_wake(worker)
    worker.wake_up(tags=["weights"])
    assert worker.tags == ["weights"]
    assert worker.model_runner.model.experts.w13_weight is before
    assert worker.model_runner.model.experts.w2_weight.shape == (2, 4, 3)


def test_repairs_are_for_old_versions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend, "installed_version", lambda: Version("0.27.1"))
    worker = Worker023(expert_model())
    original = worker.wake_up
    ascend.repair_worker(worker)
    assert worker.wake_up == original


def test_draws_follow_the_probabilities_and_each_rows_own_generator() -> None:
    probs = torch.tensor([0.5, 0.3, 0.2, 0.0])
    torch.manual_seed(0)
    drawn = ascend.draw_on_one_stream(probs.repeat(20000, 1), {})
    shares = torch.bincount(drawn, minlength=4) / 20000
    assert torch.allclose(shares, probs, atol=0.02)
    assert shares[3] == 0
    seeded = [
        ascend.draw_on_one_stream(
            probs.repeat(2, 1), {0: torch.Generator().manual_seed(4), 1: torch.Generator().manual_seed(5)}
        ).tolist()
        for _ in range(3)
    ]
    assert seeded[0] == seeded[1] == seeded[2]


@pytest.mark.parametrize(
    ("name", "value", "eager"),
    [
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", True),
        ("VLLM_ASCEND_ENABLE_FLASHCOMM1", "1", True),
        ("TASK_QUEUE_ENABLE", "2", False),
        ("ASCEND_LAUNCH_BLOCKING", "1", False),
    ],
)
def test_harmful_settings_are_refused(name: str, value: str, eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ascend.check_environment(Version("0.23.0.post1"), eager=eager)
    monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentCheckError, match=name):
        ascend.check_environment(Version("0.23.0.post1"), eager=eager)


def test_nz_is_off_by_argument_and_where_it_is_read_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ASCEND_ENABLE_NZ", raising=False)
    ascend.set_environment(Version("0.30.0rc2"))
    assert "VLLM_ASCEND_ENABLE_NZ" not in os.environ
    ascend.set_environment(Version("0.23.0.post1"))
    assert os.environ["VLLM_ASCEND_ENABLE_NZ"] == "0"
    eager = ascend.engine_arguments(Version("0.23.0.post1"), eager=True)
    assert eager == {"additional_config": {"weight_nz_mode": 0}}
    graphs = ascend.engine_arguments(Version("0.23.0.post1"), eager=False)
    assert graphs["compilation_config"] == {"cudagraph_mode": "FULL_DECODE_ONLY"}
