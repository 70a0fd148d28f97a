"""One Prefect server and one stand-in configuration for the tests that run a flow through the engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dapo.config import io

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Not autouse: only tests that need the engine pay for the server. Never the developer's own server or home."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PREFECT_")}
    from prefect.settings import PREFECT_HOME, PREFECT_LOCAL_STORAGE_PATH, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect")
    with (
        temporary_settings({PREFECT_HOME: home, PREFECT_LOCAL_STORAGE_PATH: home / "storage"}),
        prefect_test_harness(server_startup_timeout=120),
    ):
        yield
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds runs, cache and the databases that take long to make the first time."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def ray(shared: Path) -> Iterator[Any]:
    """One local head for all tests; it must be gone without a trace afterwards."""
    from dapo.runtime import cluster, processes

    config = io.validate(standin_tree(shared, "any"))
    yield cluster.connect(config)
    head = json.loads((cluster.state_folder(config) / "head.json").read_text())
    assert cluster.stop_local(config) == []
    assert processes.family(head["mark"]) == []
    assert not Path(head["temp_dir"]).exists()


def standin_tree(root: Path, name: str, **env: str) -> dict[str, Any]:
    """A small run whose job is the stand-in."""
    return {
        "name": name,
        "device": "cpu",
        "run_root": str(root / "runs"),
        "data": {
            "source": {"kind": "synthetic", "train": 8, "validation": 4, "test": 4},
            "instruction": "",
            "max_prompt_tokens": 64,
            "cache_dir": str(root / "cache"),
        },
        "model": {"source": {"kind": "tiny", "warmup_steps": 0}},
        "batch": {"prompts_per_step": 4, "prompts_per_update": 2, "group_size": 2, "max_response_tokens": 24},
        "train": {"steps": 4, "test_freq": 2, "save_freq": 2},
        "ray": {"env": {"STANDIN_SECONDS": "0.05", **env}},
    }
