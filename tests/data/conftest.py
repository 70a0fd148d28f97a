"""Folders that several tests read and none writes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dapo.data.processor import PromptProcessor
from tests.data.folders import write_text_folder, write_vision_folder
from tests.data.hub_server import Hub, running_hub


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_folder(tmp_path_factory.mktemp("models") / "vision")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="session")
def processor(vision_folder: Path) -> PromptProcessor:
    return PromptProcessor(vision_folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of our own; the client's local cache is an empty folder, so that the developer's is not touched."""
    from huggingface_hub import constants

    import dapo.data.retry

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "client-cache"))
    monkeypatch.setattr(dapo.data.retry, "FIRST_WAIT_S", 0.01)
    with running_hub() as running:
        yield running
