"""Lets the registry's torchvision, which is linked against CUDA, be imported beside a CPU torch.

transformers' processors and vLLM use only torchvision's Python parts (transforms, io), but importing the package
registers fake kernels for two operators of an extension that cannot load here. Declaring the operators first is enough.
Where the real extension loads, nothing is declared. Call `install` before anything imports torchvision.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_declared: Any = None  # a torch Library's definitions die with it


def install() -> None:
    """Declare the missing operator schemas, once, only where torchvision's own extension does not load."""
    global _declared
    spec = importlib.util.find_spec("torchvision")
    if _declared is not None or spec is None or not spec.submodule_search_locations:
        return
    import torch

    root = Path(next(iter(spec.submodule_search_locations)))
    for extension in (root / "_C.so", root / "_C_stable.so"):
        if extension.exists():
            try:
                torch.ops.load_library(str(extension))
                return
            except OSError:
                continue  # linked against CUDA libraries that are not here
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def vllm_platform_plugin() -> None:
    """Entry point `vllm.platform_plugins`: runs in every process vLLM starts. None means: not a platform."""
    install()
