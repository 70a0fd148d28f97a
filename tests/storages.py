"""Object storage for tests: a folder, memory, and a real S3 server where `requirements/s3.lock` is installed."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Iterator

import pytest

HAS_S3 = all(importlib.util.find_spec(name) for name in ("s3fs", "moto"))
S3 = pytest.mark.skipif(not HAS_S3, reason="needs s3fs and moto: make test-s3")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a server with one bucket, `bucket`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=S3)])
def storage(request, tmp_path, monkeypatch) -> str:
    """URL of an empty folder."""
    if request.param != "s3":
        place = tmp_path / "storage" if request.param == "file" else f"/{uuid.uuid4().hex}"
        return f"{request.param}://{place}"
    return s3_folder(request.getfixturevalue("s3_server"), monkeypatch)


def s3_folder(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of the server's, with the variables that a user would set."""
    import s3fs

    for name, value in s3_variables(server).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)
    return f"s3://bucket/{uuid.uuid4().hex}"


def s3_variables(server: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
