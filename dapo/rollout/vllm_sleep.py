"""How deep vLLM sleeps between generation phases, and what that frees."""

from __future__ import annotations

import importlib

import torch

SLEEP_LEVEL = {"cuda": 1, "npu": 1}
"""Of the platforms that can sleep. Level 1 keeps what is not the cache in host memory; level 2 drops it and restores
buffers alone. Weights come anew with each sync, but not what a model keeps in plain attributes:

- cuda (read in 0.32): Qwen3-VL's `deepstack_input_embeds`, which are added to every token's hidden states in the first
  layers, would be whatever lay in that memory, also for prompts without an image. And a sync sends only what changed:
  weights it leaves out must have survived.
- npu (up to 0.30.0rc2): a table of expert ids is lost, and with expert parallelism the engine then writes fluent, wrong
  text (verl#7086).
"""


def free_bytes(platform: str) -> int:
    """Of the current device, whoever uses the rest."""
    if platform == "npu":
        importlib.import_module("torch_npu")
    free: int = getattr(torch, platform).mem_get_info()[0]
    return free
