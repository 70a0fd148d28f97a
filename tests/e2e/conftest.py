"""One Prefect server, worker and MLflow server for all tests that need them as processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.servers import Servers


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("servers"))
    try:
        yield servers.start()
    finally:
        servers.close()
