"""`pytest tests/parity --golden DIR` runs the golden files of any folder; without it, the open ones in tests/golden."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.cases import load_cases

OPEN_VECTORS = Path(__file__).parent.parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", help="folder of golden files (schema: tests/golden/SCHEMA.md)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden(topic): run once per case of this topic of the golden files")


def golden_folder(config: pytest.Config) -> Path:
    # The option is unknown to a run that did not name this folder: pytest then reads this file after its arguments.
    return Path(config.getoption("golden", default=None) or OPEN_VECTORS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is not None:
        metafunc.parametrize("case", load_cases(golden_folder(metafunc.config), marker.args[0]), ids=str)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder the cases come from."""
    return golden_folder(request.config)
