"""A cancelled evaluation: its flow ends by itself, and where that was killed its Ray job is ended for it."""

from __future__ import annotations

import contextvars
import threading
import time
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelling

from dapo.config import io
from dapo.runtime.turn import EVALUATION
from flows.cancellation import HOOKS
from tests.flows.conftest import standin_tree
from tests.flows.test_ray_job import job_of, make_run


@pytest.mark.parametrize("name", ["evaluate", "retrain"])
def test_job_of_a_killed_flow_s_evaluation_is_ended_and_no_other(ray, shared, name):
    ours, theirs = uuid4(), uuid4()
    jobs = []
    for owner in (ours, theirs):
        run, config = make_run(shared / "runs", f"of-{name}-{owner}", STANDIN_SECONDS="600")
        jobs.append(job_of(ray, run, config, kind=EVALUATION, owner=str(owner), turn=False))
        assert jobs[-1].start()
    flow_run = FlowRun(id=ours, flow_id=uuid4(), parameters={"config": config.model_dump(mode="json"), "model": "base"})
    try:
        HOOKS[name](None, flow_run, None)
        end_at = time.monotonic() + 30
        while jobs[0].running():
            assert time.monotonic() < end_at, "the evaluation's job keeps its devices"
            time.sleep(0.2)
        assert jobs[1].running()
    finally:
        for job in jobs:
            job.kill()


def test_evaluation_that_no_worker_tells_of_its_cancellation_ends_by_itself(prefect_api, tmp_path, monkeypatch):
    """Prefect's worker passes on only the first cancellation of a flow run, not the one after a retry."""
    import flows.evaluate

    def measures(config, reference, data, label):
        flow_run_id = this_run.id

        def cancel():
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(flow_run_id, Cancelling(), force=True)

        threading.Thread(target=contextvars.copy_context().run, args=(cancel,)).start()
        time.sleep(120)

    monkeypatch.setattr(flows.evaluate, "evaluate_model", measures)
    config = io.validate(standin_tree(tmp_path, "any"))
    began = time.monotonic()
    state = flows.evaluate.evaluate(config=config, data=str(tmp_path), return_state=True)
    assert state.is_cancelled(), state
    assert time.monotonic() - began < 60
