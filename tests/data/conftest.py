"""Folders that several tests read and none writes."""

from pathlib import Path

import pytest

from dapo.data.processor import PromptProcessor
from tests.data.folders import write_text_folder, write_vision_folder


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_folder(tmp_path_factory.mktemp("models") / "vision")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="session")
def processor(vision_folder: Path) -> PromptProcessor:
    return PromptProcessor(vision_folder)
