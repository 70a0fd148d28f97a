"""FLOP counts of configurations as they are found on disk."""

import json

from dapo.plan.flops import ModelFlops
from tests.model.tiny import EXPERTS, make_folder


def test_experts_are_counted_under_the_hubs_name_and_under_that_of_transformers(tmp_path):
    text = json.loads((make_folder(tmp_path, "text-moe") / "config.json").read_text())
    rest = {name: value for name, value in text.items() if name not in ("num_experts", "num_local_experts")}
    hub, written = ({**rest, name: EXPERTS} for name in ("num_experts", "num_local_experts"))
    assert ModelFlops.of("qwen3_moe", text, None) == ModelFlops.of("qwen3_moe", hub, None)
    assert ModelFlops.of("qwen3_moe", written, None) == ModelFlops.of("qwen3_moe", hub, None)
