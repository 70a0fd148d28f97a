"""Files that several processes share: whoever waits learns for whom."""

import threading
from pathlib import Path

import pytest

from dapo.data import storage


def test_who_waits_for_a_download_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wait = storage._WAIT_S
    storage._WAIT_S = 0.05
    try:
        release, held = threading.Event(), threading.Event()

        def hold() -> None:
            with storage.exclusive(tmp_path / "x.lock", "downloading org/model"):
                held.set()
                release.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(10)
        threading.Timer(0.3, release.set).start()
        with storage.exclusive(tmp_path / "x.lock", "downloading org/model"):
            pass
        thread.join()
    finally:
        storage._WAIT_S = wait
    assert "waiting for another process that is downloading org/model" in caplog.text
