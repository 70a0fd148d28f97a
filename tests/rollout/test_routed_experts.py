"""What vLLM reports of the experts it chose, read as the trainer needs it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dapo.errors import ConfigError, EngineError
from dapo.rollout.routed_experts import expert_layers, experts_of
from tests.records import prompt


def test_layers_with_experts_are_those_of_the_configuration(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    assert expert_layers(folder_of("moe")) == [0, 1]
    text = {"num_hidden_layers": 6, "num_experts": 4, "mlp_only_layers": [3], "decoder_sparse_step": 2}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert expert_layers(tmp_path) == [1, 5]
    with pytest.raises(ConfigError, match="has no experts"):
        expert_layers(folder_of("dense"))


def test_the_first_sample_tells_of_the_prompt_and_others_of_the_response_only() -> None:
    asked = prompt("train/1")
    before, written, layers, choices = len(asked.token_ids), 4, 3, 2
    routed = np.arange((before + written - 1) * layers * choices, dtype=np.uint8).reshape(-1, layers, choices)
    sample = SimpleNamespace(token_ids=[1] * written, routed_experts=routed)
    assert experts_of(sample, asked, [0, 2], first=True) == routed[:, [0, 2]].tobytes()
    assert experts_of(sample, asked, [0, 2], first=False) == routed[before:, [0, 2]].tobytes()


def test_a_sample_that_tells_too_little_is_refused() -> None:
    asked = prompt("train/1")
    for routed in (None, np.zeros((1, 2, 2), dtype=np.uint8)):
        with pytest.raises(EngineError, match="router_replay=false"):
            experts_of(SimpleNamespace(token_ids=[1, 2], routed_experts=routed), asked, [0], first=True)
