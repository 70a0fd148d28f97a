"""Fetching from a hub: the real client code against a loopback hub that breaks, lies and disappears."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapo.data.hub import HubRepo
from dapo.errors import DataError, WeightsError
from tests.data.hub_server import Fault, Hub, Repo

REPO = "org/model"
# The client hands on what it received in chunks of 10 MiB: a break must come later than that to leave a part.
LARGE = random.Random(0).randbytes(13 * 2**20)
SMALL = LARGE[: 2**20]
FILES = {"config.json": b'{"model_type": "qwen3"}', "sub/model.safetensors": SMALL}
LARGE_FILES = FILES | {"sub/model.safetensors": LARGE}


@pytest.fixture
def repo(hub: Hub) -> Repo:
    return hub.add("models", REPO, FILES)


@pytest.fixture
def large_repo(hub: Hub) -> Repo:
    return hub.add("models", REPO, LARGE_FILES)


def client(hub: Hub, cache: Path, revision: str = "main", name: str = REPO) -> HubRepo:
    return HubRepo(name, kind="model", revision=revision, endpoint=hub.endpoint, cache=cache)


def fetch(hub: Hub, cache: Path, revision: str = "main") -> Path:
    repo = client(hub, cache, revision)
    commit = repo.resolve()
    return repo.snapshot(commit, repo.files(commit))


def script(cache: Path) -> str:
    """Python that fetches from the hub of its environment and writes the folder's name."""
    return (
        "import sys, pathlib; from dapo.data.hub import HubRepo\n"
        f"cache = pathlib.Path({str(cache)!r})\n"
        f"repo = HubRepo({REPO!r}, kind='model', revision='main', endpoint=None, cache=cache)\n"
        "commit = repo.resolve(); sys.stdout.write(str(repo.snapshot(commit, repo.files(commit))))"
    )


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def test_loopback_hub_satisfies_the_official_client(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "official")
    assert content(Path(folder)) == FILES


def test_snapshot_holds_the_files_of_the_commit_and_says_which(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    folder = fetch(hub, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert content(folder) == FILES
    assert (manifest["commit"], manifest["revision"]) == (repo.commit, "main")
    assert folder.name == repo.commit


def test_second_fetch_downloads_nothing(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    folder = fetch(hub, tmp_path)
    before = hub.bytes_sent("/cdn/*")
    assert fetch(hub, tmp_path) == folder
    assert hub.bytes_sent("/cdn/*") == before == len(SMALL)


def test_broken_connection_is_continued_where_it_broke(hub: Hub, large_repo: Repo, tmp_path: Path) -> None:
    hub.faults = [Fault("/cdn/*", break_after=11 * 2**20)]
    assert content(fetch(hub, tmp_path)) == LARGE_FILES
    starts = [r.start for r in hub.requests if r.path.startswith("/cdn/")]
    assert starts == [0, 10 * 2**20]


def test_part_left_by_a_killed_process_is_continued(hub: Hub, large_repo: Repo, tmp_path: Path) -> None:
    part = client(hub, tmp_path).folder / f"{large_repo.commit}.partial" / "sub" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(LARGE[: 9 * 2**20])
    assert content(fetch(hub, tmp_path)) == LARGE_FILES
    assert hub.bytes_sent("/cdn/*") == len(LARGE) - 9 * 2**20


def test_killed_download_is_continued_by_the_next_run(hub: Hub, large_repo: Repo, tmp_path: Path) -> None:
    hub.faults = [Fault("/cdn/*", stall_after=12 * 2**20)]
    part = client(hub, tmp_path).folder / f"{large_repo.commit}.partial" / "sub" / "model.safetensors.part"
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", script(tmp_path)], env=env)
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size):
        assert time.monotonic() < deadline, "the download did not begin"
        time.sleep(0.02)
    run.kill()
    run.wait(10)
    begun = part.stat().st_size
    assert content(fetch(hub, tmp_path)) == LARGE_FILES
    assert [r.start for r in hub.requests if r.path.startswith("/cdn/")] == [0, begun]


def test_connection_that_falls_silent_is_given_up_and_continued(
    hub: Hub, large_repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.faults = [Fault("/cdn/*", stall_after=12 * 2**20)]
    assert content(fetch(hub, tmp_path)) == LARGE_FILES


def test_disk_that_fills_up_on_the_way_is_one_sentence(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    # The kernel refuses to let a file grow further: for the writer the same as a disk that is full.
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n" + script(tmp_path)
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", limited], env=env, capture_output=True, text=True, timeout=60)
    last = run.stderr.splitlines()[-1]
    assert last.startswith("dapo.errors.WeightsError: no room left while writing model org/model")
    assert "set data.cache_dir to a larger disk" in last


def test_server_that_ignores_ranges_gives_a_whole_file_all_the_same(hub: Hub, large_repo: Repo, tmp_path: Path) -> None:
    hub.faults = [Fault("/cdn/*", break_after=11 * 2**20), Fault("/cdn/*", ignore_range=True)]
    assert content(fetch(hub, tmp_path)) == LARGE_FILES


@pytest.mark.parametrize("path", ["/api/*", "*/config.json", "/cdn/*"])
def test_busy_server_is_asked_again(hub: Hub, repo: Repo, tmp_path: Path, path: str) -> None:
    hub.faults = [Fault(path, status=503, times=3)]
    assert content(fetch(hub, tmp_path)) == FILES
    assert hub.faults[0].times == 0


@pytest.mark.parametrize("path", ["*/config.json", "/cdn/*"])
def test_wrong_bytes_are_noticed_and_fetched_again(hub: Hub, repo: Repo, tmp_path: Path, path: str) -> None:
    hub.faults = [Fault(path, corrupt=True)]
    assert content(fetch(hub, tmp_path)) == FILES


def test_wrong_bytes_that_stay_wrong_end_in_one_clear_error(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    hub.faults = [Fault("/cdn/*", corrupt=True, times=100)]
    with pytest.raises(WeightsError, match=r"sub/model\.safetensors could not be fetched.*checksum.*5 attempts"):
        fetch(hub, tmp_path)
    assert not (client(hub, tmp_path).folder / repo.commit).exists()


def test_finished_files_survive_the_failure_of_another(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    hub.faults = [Fault("/cdn/*", status=503, times=5)]
    with pytest.raises(WeightsError, match="answers 503"):
        fetch(hub, tmp_path)
    asked = sum(r.path.endswith("config.json") for r in hub.requests)
    assert content(fetch(hub, tmp_path)) == FILES
    assert sum(r.path.endswith("config.json") for r in hub.requests) == asked


def test_two_processes_download_once(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    code = script(tmp_path)
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for _ in range(2)]
    folders = {run.communicate(timeout=60)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert len(folders) == 1
    assert hub.bytes_sent("/cdn/*") == len(SMALL)


def test_commit_is_resolved_anew_when_the_branch_moves(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path)
    hub.add("models", REPO, FILES | {"config.json": b"{}"})
    second = fetch(hub, tmp_path)
    assert first != second
    assert (second / "config.json").read_bytes() == b"{}"
    assert hub.bytes_sent("/cdn/*") == 2 * len(SMALL)


def test_unreachable_hub_leaves_what_was_fetched_usable(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    folder = fetch(hub, tmp_path)
    hub.faults = [Fault("*", status=502, times=1000)]
    assert fetch(hub, tmp_path) == folder


def test_hub_that_cannot_be_reached_at_all_is_named(tmp_path: Path, hub: Hub) -> None:
    gone = HubRepo(REPO, kind="dataset", revision="main", endpoint="http://127.0.0.1:1", cache=tmp_path)
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:1 cannot be reached .*no earlier download"):
        gone.resolve()


def test_offline_finds_what_the_official_client_downloaded(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    home = tmp_path / "home"
    snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=home / "hub")
    seen = len(hub.requests)
    code = script(tmp_path)
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.endpoint}
    env.pop("HF_HUB_CACHE", None)
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert content(Path(out.stdout)) == FILES
    assert len(hub.requests) == seen


def test_offline_without_anything_says_what_to_do(
    hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE is set.*connect once, or give a local folder"):
        fetch(hub, tmp_path)
    with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE is set.*connect once, or give a local folder"):
        fetch(hub, tmp_path, revision=repo.commit)
    assert hub.requests == []


def test_pinned_commit_needs_no_question_to_the_hub_once_it_is_here(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    folder = fetch(hub, tmp_path, revision=repo.commit)
    seen = len(hub.requests)
    assert fetch(hub, tmp_path, revision=repo.commit) == folder
    assert len(hub.requests) == seen


def test_repository_that_does_not_exist_is_not_asked_for_twice(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no model 'org/typo'.*check the name"):
        client(hub, tmp_path, name="org/typo").resolve()
    assert len(hub.requests) == 1


def test_unknown_revision_gated_and_malformed_names_are_told_apart(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no branch, tag or commit 'v9'"):
        client(hub, tmp_path, "v9").resolve()
    with pytest.raises(WeightsError, match="it is written org/name"):
        client(hub, tmp_path, name="a/b/c").resolve()
    repo.gated = True
    with pytest.raises(WeightsError, match="gated: accept its terms"):
        client(hub, tmp_path).resolve()


def test_too_small_a_disk_is_noticed_before_the_large_files(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    repo.claimed_sizes["sub/model.safetensors"] = 2**60
    with pytest.raises(WeightsError, match=r"model org/model needs 1073741824\.0 GiB more, .* has [0-9.]+ GiB free"):
        fetch(hub, tmp_path)
    assert hub.bytes_sent("/cdn/*") == 0


def test_token_goes_to_the_hub_and_not_to_its_content_host(
    hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(hub, tmp_path)
    assert {r.authorised for r in hub.requests if r.path.startswith("/cdn/")} == {False}
    assert {r.authorised for r in hub.requests if not r.path.startswith("/cdn/")} == {True}


def test_repository_that_lists_files_outside_of_itself_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("models", REPO, {"../../evil.json": b"{}"})
    with pytest.raises(WeightsError, match="outside of itself"):
        fetch(hub, tmp_path)


def test_progress_counts_bytes_up_to_the_total(hub: Hub, large_repo: Repo, tmp_path: Path) -> None:
    hub.faults = [Fault("/cdn/*", break_after=11 * 2**20)]
    calls: list[tuple[int, int, str]] = []
    asked = client(hub, tmp_path)
    commit = asked.resolve()
    asked.snapshot(commit, asked.files(commit), progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    total = sum(map(len, LARGE_FILES.values()))
    assert calls[-1] == (total, total, f"bytes of model {REPO}")
