"""The fan-out over Ray actors, on a real Ray with small actors."""

from __future__ import annotations

import os
import time

import pytest
import ray

from dapo.config import io
from dapo.errors import EngineError, TrainingError
from dapo.runtime.workers import RayEngine, Workers
from dapo.types import Completion, Finished, FinishReason, Prompt, SamplingParams

PARAMS = SamplingParams(2, 1.0, 1.0, -1, 8, (0,), ())


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": dict(PATHS)})
    yield
    ray.shutdown()


PATHS = {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}


class Replica:
    """Writes the number of the prompt, one prompt at a time; `dies`, `hangs` and `garbage` are what they say."""

    def ready(self):
        return True

    def stream(self, prompts, params, begun):
        for index, prompt in enumerate(prompts):
            if prompt.answer == "dies":
                os._exit(1)
            if prompt.answer == "garbage":
                raise EngineError("the engine returned token -1")
            if prompt.answer == "hangs":
                time.sleep(60)
            yield [
                Finished(index, i, Completion((int(prompt.id), i), (0.0, 0.0), FinishReason.STOP, 3))
                for i in range(params.n)
                if not begun or begun[index][i] is None
            ]


def engine_of(replicas, *, tensor_parallel=1, deadline_s=30.0):
    world = replicas * tensor_parallel
    workers = object.__new__(Workers)
    workers.config = io.validate(
        {
            "model": {"parallel": {"world_size": world}},
            "rollout": {"tensor_parallel": tensor_parallel, "deadline_s": deadline_s},
        }
    )
    workers.generators = []
    workers.trainers = [ray.remote(Replica).options(num_cpus=0).remote() for _ in range(world)]
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
def test_a_worker_that_dies_is_told_from_one_that_hangs_and_what_came_before_is_given():
    came = []
    with pytest.raises(TrainingError, match="a worker process died during generation"):
        came.extend(engine_of(1).stream(prompts("a", "dies"), PARAMS))
    assert {done.prompt for done in came} <= {0}
    came = []
    with pytest.raises(TrainingError, match="did not end within 5 s: it hangs"):
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
