"""Whatever a reward does, every item gets an outcome and nothing hangs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dapo.errors import ConfigError, RewardError
from dapo.rewards.pool import RewardPool
from dapo.types import Crashed, Scored, TimedOut

OBEDIENT = "tests.rewards.samples:obedient"


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(OBEDIENT, workers=2, deadline_s=0.5) as pool:
        yield pool


def one(pool: RewardPool, response: str, answer: str = "") -> Scored | TimedOut | Crashed:
    (outcome,) = pool.score([(response, answer)])
    return outcome


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until_gone(pid: int, seconds: float = 10.0) -> bool:
    give_up = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < give_up:
        time.sleep(0.05)
    return not alive(pid)


def test_outcomes_come_in_the_order_of_the_items(pool: RewardPool) -> None:
    items = [(f"echo {i}", str(i - i % 3)) for i in range(1000)]
    assert pool.score(items) == [Scored(i % 3 == 0, 0.5, 0.0, str(i)) for i in range(1000)]


def test_text_of_any_kind_reaches_the_reward_unchanged(pool: RewardPool) -> None:
    for text in ("", "\n", "\x00", "\ud800", "三角形", "a" * 3_000_000, '"}\n{', "\u2028\u0085\r"):
        outcome = one(pool, f"echo {text}", text)
        assert isinstance(outcome, Scored)
        assert outcome.accuracy


def test_nothing_to_score_is_no_outcome(pool: RewardPool) -> None:
    assert pool.score([]) == []


def test_a_hang_costs_its_own_item_only(pool: RewardPool) -> None:
    before = pool.replaced
    items = [("right", "")] * 100
    items[37] = ("hang", "")
    outcomes = pool.score(items)
    assert outcomes[37] == TimedOut(0.5)
    assert [o for i, o in enumerate(outcomes) if i != 37] == [Scored(True)] * 99
    assert pool.replaced == before + 1


def test_a_hang_inside_one_operation_is_killed(pool: RewardPool) -> None:
    started = time.monotonic()
    assert one(pool, "hang-in-c") == TimedOut(0.5)
    assert time.monotonic() - started < 5.0


def test_each_item_has_its_own_deadline(pool: RewardPool) -> None:
    assert pool.score([("sleep 0.2", "")] * 6) == [Scored(True)] * 6


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("raise no such angle", "ValueError: no such angle"),
        ("exit 3", "SystemExit: 3"),
        ("vanish 3", "the worker process ended with exit code 3"),
        ("signal SIGSEGV", "the worker process was killed by SIGSEGV"),
        ("signal SIGKILL", "the worker process was killed by SIGKILL"),
    ],
)
def test_a_crash_has_its_reason_and_costs_its_own_item_only(pool: RewardPool, response: str, reason: str) -> None:
    outcomes = pool.score([("right", ""), (response, ""), ("wrong", "")] * 3)
    for right, crashed, wrong in zip(outcomes[::3], outcomes[1::3], outcomes[2::3], strict=True):
        assert (right, wrong) == (Scored(True), Scored(False))
        assert isinstance(crashed, Crashed)
        assert reason in crashed.reason


def test_a_raising_reward_says_where(pool: RewardPool) -> None:
    outcome = one(pool, "raise oh")
    assert isinstance(outcome, Crashed)
    assert "samples.py:" in outcome.reason


@pytest.mark.parametrize(("name", "accuracy"), [("one", True), ("zero", False)])
def test_one_and_zero_are_verdicts(pool: RewardPool, name: str, accuracy: bool) -> None:
    assert one(pool, f"return {name}") == Scored(accuracy)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("half", "neither right (1) nor wrong (0)"),
        ("two", "neither right (1) nor wrong (0)"),
        ("nan", "neither right (1) nor wrong (0)"),
        ("none", "NoneType"),
        ("text", "str '1.0'"),
        ("dict", "dict"),
        ("number as accuracy", "accuracy=1.0"),
        ("format above one", "format=1.5"),
        ("format not a number", "format=nan"),
        ("positive penalty", "overlong=0.5"),
    ],
)
def test_what_is_no_verdict_is_a_crash_and_no_zero(pool: RewardPool, name: str, reason: str) -> None:
    outcome = one(pool, f"return {name}")
    assert isinstance(outcome, Crashed)
    assert reason in outcome.reason


def test_a_reward_may_print(pool: RewardPool) -> None:
    assert one(pool, 'print {"accuracy": false}\n') == Scored(True)


def test_replaced_workers_are_counted() -> None:
    with RewardPool(OBEDIENT, workers=1, deadline_s=0.5) as pool:
        pool.score([("right", ""), ("raise x", ""), ("hang", ""), ("vanish 1", ""), ("wrong", "")])
        assert pool.replaced == 2


def test_a_killed_worker_takes_its_children_along(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with RewardPool(OBEDIENT, workers=1, deadline_s=2.0) as pool:
        assert one(pool, f"child {note}") == TimedOut(2.0)
    assert wait_until_gone(int(note.read_text()))


def test_the_pool_leaves_no_process_behind() -> None:
    with RewardPool(OBEDIENT, workers=2) as pool:
        outcomes = pool.score([("pid", "")] * 20)
        pids = {int(o.extracted) for o in outcomes if isinstance(o, Scored)}
        assert len(pids) == 2
    assert all(wait_until_gone(pid) for pid in pids)
    with pytest.raises(RewardError, match="closed"):
        pool.score([("right", "")])


@pytest.mark.parametrize("busy", ["", "hang-in-c"])
def test_workers_die_with_their_parent(busy: str) -> None:
    program = f"""
        import os, threading, time
        from dapo.rewards.pool import RewardPool
        pool = RewardPool({OBEDIENT!r}, deadline_s=1.0)
        print(pool.score([("pid", "")])[0].extracted, flush=True)
        if {busy!r}:
            threading.Thread(target=pool.score, args=([({busy!r}, "")],), daemon=True).start()
            time.sleep(0.3)
        os._exit(1)
    """
    parent = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert wait_until_gone(int(parent.stdout), 20.0)


def test_an_interrupted_call_does_not_answer_the_next_one(pool: RewardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RewardPool, "_turn", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.score([("right", "")] * 10)
    assert pool.score([("wrong", "")] * 10) == [Scored(False)] * 10


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("geometry3k", "not of the form module:name"),
        ("dapo.rewards.geometry:grade", "No module named"),
        ("dapo.rewards.geometry3k:grad", "did you mean 'grade'"),
        ("tests.rewards.broken:grade", "RuntimeError: no licence for this grader"),
        ("tests.rewards.samples:Fussy", "made without arguments"),
        ("tests.rewards.samples:NOT_CALLABLE", "is a value of type int"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_a_mistake_in_the_configuration(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"reward\.function=") as error:
        RewardPool(function)
    assert message in str(error.value)


def test_a_class_is_made_once_per_worker() -> None:
    with RewardPool("tests.rewards.samples:Counting", workers=1) as pool:
        assert pool.score([("", "")] * 4) == [Scored(True), Scored(False), Scored(True), Scored(False)]


def test_workers_are_small() -> None:
    with RewardPool("dapo.rewards.geometry3k:grade") as pool:
        pool.score([("<think></think>\\boxed{\\sqrt{3+2\\sqrt{2}}}", "1+\\sqrt{2}")] * 100)
        (worker,) = pool._workers
        modules = Path(f"/proc/{worker.process.pid}/maps").read_text()
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_kib < 40 * 1024
    assert "torch" not in modules
    assert "numpy" not in modules
