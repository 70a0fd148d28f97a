"""What `dapo down --stop-runs` waits for: a real Prefect server and Ray, a stand-in for worker and training."""

import contextvars
import json
import os
import sys
import threading
import time

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Completed, Pending, Running

from dapo.errors import TrainingError
from dapo.observe.journal import last_end, read
from flows import down
from flows.up import Stack
from tests.flows.test_ray_job import job_of, make_run

pytestmark = pytest.mark.usefixtures("prefect_api")


@flow(name="any")
def any_flow() -> None:
    """Stands for the flows of the pool."""


@pytest.fixture
def stack(shared):
    from flows.pool import make_pool

    (shared / "prefect.yaml").write_text(
        "deployments: [{name: geo3k, entrypoint: 'flows.dapo:dapo', work_pool: {name: ours}}]\n"
    )
    make_pool("ours")
    stack = Stack(shared, lambda words: None)
    worker = stack.worker("ours")
    worker.start([sys.executable, "-c", "import time; time.sleep(600)"], "", os.environ, shared)
    yield stack
    worker.stop()


@pytest.fixture
def flow_run(stack):
    """Makes a flow run that a worker of the pool has taken, and reports its end to the server."""
    with get_client(sync_client=True) as client:
        known = client.create_flow(any_flow)
        deployment = client.create_deployment(known, "down", entrypoint="any:any", work_pool_name="ours")

        def begin():
            run = client.create_flow_run_from_deployment(deployment)
            for state in (Pending(), Running()):
                client.set_flow_run_state(run.id, state, force=True)
            return run.id

        yield begin, lambda one: client.set_flow_run_state(one, Completed(), force=True)


@pytest.mark.slow
def test_it_waits_for_the_trainings_here_and_their_flow_runs_and_for_nothing_else(ray, shared, stack, flow_run):
    begin, complete = flow_run
    begin()  # evaluates, or trains on a cluster elsewhere
    ours = begin()
    run, config = make_run(shared / "runs", "stopped", STANDIN_SECONDS="0.3")
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 5000})})
    job = job_of(ray, run, config)
    (run.root / "prefect.json").write_text(json.dumps({"flow_runs": [str(ours)]}))
    job.start()
    while not run.journal.exists():
        time.sleep(0.1)

    def follow():
        while not last_end(run.journal):
            time.sleep(0.1)
        time.sleep(2.0)  # its report
        reported.append(time.monotonic())
        complete(ours)

    reported = []
    follower = threading.Thread(target=contextvars.copy_context().run, args=(follow,))
    follower.start()
    down._stop_trainings(stack, True, 60.0)
    assert reported, "its flow run was waited for"
    follower.join()
    assert last_end(run.journal).data == {"status": "stopped", "reason": "dapo down --stop-runs"}
    down._stop_trainings(stack, True, 0.0)


def test_a_training_that_takes_longer_is_named(ray, shared, stack, flow_run):
    flow_run[0]()
    run, config = make_run(shared / "runs", "stubborn", STANDIN_SECONDS="600")
    job = job_of(ray, run, config)
    job.start()
    while not any(event.kind == "progress" for event in read(run.journal)):  # in the midst of its step
        time.sleep(0.1)
    with pytest.raises(TrainingError, match=f"^{run.id} did not stop within 1 s"):
        down._stop_trainings(stack, True, 1.0)
    job.end()
