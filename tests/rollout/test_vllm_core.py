"""The watch over an engine's process, on a real process that does not answer."""

from __future__ import annotations

import multiprocessing
import queue
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from dapo.errors import EngineError
from dapo.rollout.vllm_core import CoreWatch


def test_a_process_that_does_not_answer_is_killed_and_whoever_waits_is_told() -> None:
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    process.start()
    answer: Future[None] = Future()
    client = SimpleNamespace(outputs_queue=queue.Queue(), utility_results={1: answer})
    watch = CoreWatch(client, [process], answer_s=1.0)
    with pytest.raises(EngineError, match="did not answer within 1 s and was killed"), watch.asked():
        answer.result(timeout=60)
    assert isinstance(client.outputs_queue.get(timeout=10), EngineError)
    process.join()
    watch.close()
