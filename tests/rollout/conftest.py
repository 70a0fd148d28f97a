"""Models built once, and engines started once, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dapo import torchvision_cpu

torchvision_cpu.install()

from dapo.data.processor import PromptProcessor  # noqa: E402
from tests.rollout.small import make_folder  # noqa: E402


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind of model (`dense`, `moe`, `text`, `text_moe`, `square_moe`, `tied`)."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            architecture = "dense" if kind == "tied" else kind
            made[kind] = make_folder(tmp_path_factory.mktemp("rollout") / kind, architecture, tied=kind == "tied")
        return made[kind]

    return get


@pytest.fixture(scope="session")
def processor_of(folder_of: Callable[[str], Path]) -> Callable[[str], PromptProcessor]:
    made: dict[str, PromptProcessor] = {}

    def get(kind: str) -> PromptProcessor:
        if kind not in made:
            made[kind] = PromptProcessor(folder_of(kind))
        return made[kind]

    return get
