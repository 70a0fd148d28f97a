"""The controller's clients and the fan-out behind them, on a real Ray with small actors."""

from __future__ import annotations

import os
import time
from copy import copy

import pytest
import ray

from dapo.config import io
from dapo.errors import ConfigError, EngineError, TrainingError
from dapo.runtime import workers as fan_out
from dapo.runtime.ray_clients import RayEngine, RayPolicy
from dapo.runtime.workers import Deadline, Workers
from dapo.types import Completion, Finished, FinishReason, Prompt, SamplingParams

PARAMS = SamplingParams(2, 1.0, 1.0, -1, 8, (0,), ())


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": dict(PATHS)})
    yield
    ray.shutdown()


PATHS = {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}


class Replica:
    """Writes the number of the prompt, one prompt at a time; `dies`, `hangs`, `garbage` and `memory` are what they say.

    Other calls end at once; `hang_at` names those that do not.
    """

    def __init__(self, hang_at=()):
        self.hang_at = hang_at

    def ready(self):
        return True

    def _call(self, name):
        if name in self.hang_at:
            time.sleep(60)
        return {}

    def sync(self, version):
        return self._call("sync")

    def send(self):
        return self._call("send")

    def receive(self, version):
        return self._call("receive")

    def sleep(self):
        return self._call("sleep")

    def wake(self):
        return self._call("wake")

    def old_logprobs(self, batch, plan):
        return self._call("old_logprobs")

    def forget_engines(self):
        return self._call("forget_engines")

    def restart_engine(self):
        raise ConfigError("vLLM refuses to start on weights: free memory is less than desired")

    def stream(self, prompts, params, begun):
        for index, prompt in enumerate(prompts):
            if prompt.answer == "dies":
                os._exit(1)
            if prompt.answer == "garbage":
                raise EngineError("the engine returned token -1")
            if prompt.answer == "memory":
                raise RuntimeError("CUDA error: out of memory")
            if prompt.answer == "hangs":
                time.sleep(60)
            yield [
                Finished(index, i, Completion((int(prompt.id), i), (0.0, 0.0), FinishReason.STOP, 3))
                for i in range(params.n)
                if not begun or begun[index][i] is None
            ]


def engine_of(replicas, *, tensor_parallel=1, deadline_s=30.0, hang_at=()):
    """Of workers that all hold an engine; the last one hangs at `hang_at`."""
    world = replicas * tensor_parallel
    workers = object.__new__(Workers)
    workers.config = io.validate(
        {
            "model": {"parallel": {"world_size": world}},
            "rollout": {"tensor_parallel": tensor_parallel, "deadline_s": deadline_s},
            "train": {"deadline_s": deadline_s},
        }
    )
    workers.generators = []
    hangs = [()] * (world - 1) + [hang_at]
    workers.trainers = [ray.remote(Replica).options(num_cpus=0).remote(at) for at in hangs]
    ray.get([actor.ready.remote() for actor in workers.trainers])
    return RayEngine(workers)


def prompts(*answers):
    return [Prompt(str(i), (1,), (), (), answer, "") for i, answer in enumerate(answers)]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("replicas", "tensor_parallel"), [(1, 1), (2, 2)])
def test_every_response_comes_once_and_in_its_place(replicas, tensor_parallel):
    out = engine_of(replicas, tensor_parallel=tensor_parallel).generate(prompts(*"abcde"), PARAMS)
    assert [[one.token_ids for one in group] for group in out] == [[(i, 0), (i, 1)] for i in range(5)]


@pytest.mark.usefixtures("cluster")
def test_what_was_written_before_goes_to_the_replica_that_answers():
    done = Completion((9,), (0.0,), FinishReason.STOP, 1)
    begun = [(done, None), (None, None), (None, done)]
    out = sorted((d.prompt, d.sample) for d in engine_of(2).stream(prompts(*"abc"), PARAMS, begun))
    assert out == [(0, 1), (1, 0), (1, 1), (2, 0)]


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_is_distinguished_from_one_that_hangs_and_what_came_before_is_given():
    came = []
    with pytest.raises(TrainingError, match="worker process trainer-0 died during generation"):
        came.extend(engine_of(1).stream(prompts("a", "dies"), PARAMS))
    assert {done.prompt for done in came} <= {0}
    came = []
    with pytest.raises(TrainingError, match="did not end within 5 s on trainer-1: it hangs"):
        came.extend(engine_of(2, deadline_s=5.0).stream(prompts("a", "b", "c", "hangs"), PARAMS))
    assert {done.prompt for done in came} == {0, 1, 2}


@pytest.mark.usefixtures("cluster")
def test_what_healthy_replicas_write_is_given_before_the_error_of_another():
    came = []
    with pytest.raises(EngineError, match="token -1"):
        came.extend(engine_of(2).stream(prompts("garbage", "b", "c", "d"), PARAMS))
    assert {done.prompt for done in came} == {1, 3}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_engines_beside_the_trainers_that_die_or_hang_can_be_started_again(how):
    engine = engine_of(1, deadline_s=8.0)
    workers = engine.workers
    workers.generators, workers.trainers = workers.trainers, []
    with pytest.raises(EngineError, match=r"died during generation|it hangs"):
        list(engine.stream(prompts("a", how), PARAMS))


CALLS = {
    "sync": lambda workers: RayPolicy(workers).sync(1),
    "sleep": lambda workers: RayEngine(workers).sleep(),
    "wake": lambda workers: RayEngine(workers).wake(),
    "old_logprobs": lambda workers: RayPolicy(workers).old_logprobs(None, None),
}


@pytest.mark.usefixtures("cluster")
def test_a_call_that_hangs_ends_the_job_and_names_the_worker_and_the_deadline():
    healthy = engine_of(2, deadline_s=1.0, hang_at=tuple(CALLS)).workers
    for call, ask in CALLS.items():
        workers = copy(healthy)
        key = "train.deadline_s" if call == "old_logprobs" else "rollout.deadline_s"
        message = rf"{call} did not end within 1 s on trainer-1: it hangs; raise {key}"
        with pytest.raises(TrainingError, match=message):
            ask(workers)
        started = time.monotonic()
        with pytest.raises(TrainingError, match=message):
            RayPolicy(workers).written(wait=True)  # nobody waits for it a second time
        assert time.monotonic() - started < 1


@pytest.mark.usefixtures("cluster")
def test_whatever_goes_wrong_in_an_engine_beside_the_trainers_is_an_engine_error():
    engine = engine_of(1)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(engine.stream(prompts("a", "memory"), PARAMS))
    workers = engine.workers
    workers.generators, workers.trainers = workers.trainers, []
    with pytest.raises(EngineError, match="generation failed on generator-0: RuntimeError: CUDA error") as failure:
        list(engine.stream(prompts("a", "memory"), PARAMS))
    assert isinstance(failure.value.__cause__.cause, RuntimeError)


@pytest.mark.usefixtures("cluster")
def test_a_trainer_that_hangs_in_a_sync_with_engines_beside_it_is_told_by_the_restart(monkeypatch):
    monkeypatch.setattr(fan_out, "START", Deadline(2.0))
    workers = engine_of(2, deadline_s=1.0, hang_at=("send",)).workers
    workers.trainers, workers.generators = workers.trainers[1:], workers.trainers[:1]
    with pytest.raises(EngineError, match="weight sync did not end within 1 s on trainer-0: it hangs"):
        RayPolicy(workers).sync(1)
    with pytest.raises(TrainingError, match="forget_engines did not end within 2 s on trainer-0"):
        workers.restart_engines()


@pytest.mark.usefixtures("cluster")
def test_what_keeps_an_engine_from_starting_again_is_not_the_configuration():
    with pytest.raises(EngineError, match="ran before did not start again: vLLM refuses to start"):
        engine_of(1).restart()
