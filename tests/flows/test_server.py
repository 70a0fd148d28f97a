"""Which Prefect server a run here uses."""

import http.server
import os
import threading

import pytest

from dapo.runtime.cluster import free_port
from flows import server


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch, tmp_path):
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_configured_api_is_the_environment_then_the_folder_then_the_profile(monkeypatch, tmp_path):
    assert server.configured_api() is None
    (tmp_path / "home").mkdir()
    profiles = 'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://profile/api"\n'
    (tmp_path / "home" / "profiles.toml").write_text(profiles)
    assert server.configured_api() == "http://profile/api"
    (tmp_path / "prefect.toml").write_text('[api]\nurl = "http://folder/api"\n')
    assert server.configured_api() == "http://folder/api"
    monkeypatch.setenv("PREFECT_API_URL", "http://environment/api")
    assert server.configured_api() == "http://environment/api"


def test_prefect_itself_reads_the_same(monkeypatch, tmp_path):
    from prefect.settings import get_current_settings
    from prefect.settings.models.root import Settings

    (tmp_path / "prefect.toml").write_text('[api]\nurl = "http://folder/api"\n')
    assert get_current_settings() is not None
    assert str(Settings().api.url) == server.configured_api() == "http://folder/api"


def test_another_program_on_the_port_is_not_taken_for_prefect():
    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<h1>hello</h1>")

        def log_message(self, *_):
            pass

    other = http.server.HTTPServer(("127.0.0.1", 0), Hello)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    assert not server.answers(f"http://127.0.0.1:{other.server_port}/api")
    other.shutdown()
    assert not server.answers(f"http://127.0.0.1:{free_port()}/api")
    assert not server.answers(None)


def test_two_runs_do_not_share_a_database(tmp_path, monkeypatch):
    servers, seen = [], []
    for _ in range(2):
        monkeypatch.setattr(os, "environ", dict(os.environ))
        servers.append(server.TemporaryServer(tmp_path / "runs" / ".prefect"))
        seen.append(os.environ)
    for each in servers:
        each.stop()
    one, two = seen
    assert one["PREFECT_HOME"] == str(tmp_path / "runs" / ".prefect")
    assert two["PREFECT_HOME"] != one["PREFECT_HOME"]
    assert two["PREFECT_LOCAL_STORAGE_PATH"] == one["PREFECT_LOCAL_STORAGE_PATH"], "skipped stages are shared"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [".prefect"], "the second one's folder is gone"
