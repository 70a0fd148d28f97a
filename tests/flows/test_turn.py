"""One training per cluster at a time, on a real local Ray: a second one waits, and says for whom."""

import contextlib
import threading
import time
from dataclasses import dataclass

import pytest

from dapo.config.run import RunConfig
from dapo.eval.evaluate import EvaluationFolder
from dapo.observe.journal import Journal
from dapo.observe.run_folder import RunFolder
from dapo.runtime.turn import ClusterHolder, cluster_holder, takes_turn
from tests.flows.test_ray_job import job_of, make_run


class Enough(Exception):
    pass


@pytest.fixture
def root(shared):
    return shared / "runs"


@contextlib.contextmanager
def first_training(ray, root, name):
    run, config = make_run(root, name, STANDIN_SECONDS="600")
    job = job_of(ray, run, config)
    assert job.start()
    yield run, job
    job.kill()


def gone(job):
    while job.running():
        time.sleep(0.2)


def test_a_second_training_waits_and_goes_on_when_the_first_is_gone(ray, root):
    run, config = make_run(root, "patient")
    seen = []
    with first_training(ray, root, "first") as (first, holder):

        def waiting(ahead):
            seen.append(ahead)
            if len(seen) == 2:
                holder.kill()  # without a last word: its journal never says that it ended

        second = job_of(ray, run, config)
        assert second.start(waiting)
        assert second.running()
        assert not holder.running()
    assert {ahead.run.id for ahead in seen} == {first.id}
    assert {ahead.job for ahead in seen} == {holder.id}
    assert abs(seen[0].since - time.time()) < 300
    assert [e.data["status"] for e, _ in second.follow() if e.kind == "ended"] == ["finished"]
    gone(second)


def test_a_waiter_can_give_up_and_has_submitted_nothing(ray, root):
    run, config = make_run(root, "impatient")
    with first_training(ray, root, "busy") as (_, holder):

        def waiting(ahead):
            raise Enough

        job = job_of(ray, run, config)
        with pytest.raises(Enough):
            job.start(waiting)
        assert job.running() is None
    assert not run.journal.exists()
    gone(holder)


def test_the_same_run_is_followed_and_an_evaluation_on_cpus_does_not_wait(ray, root):
    with first_training(ray, root, "shared-run") as (run, holder):
        again = job_of(ray, run, holder.config)
        assert again.start(lambda ahead: pytest.fail(f"waits for itself: {ahead}")) is False
        other, config = make_run(root, "measured")
        evaluation = job_of(ray, other, config, kind="evaluation", turn=takes_turn(config, ray))
        assert evaluation.start(lambda ahead: pytest.fail(f"waits: {ahead}"))
        gone(evaluation)
    gone(holder)


def test_an_evaluation_that_needs_devices_waits_for_a_training_and_a_training_for_it(ray, root):
    seen = []
    with first_training(ray, root, "has-them") as (first, holder):

        def waiting(ahead):
            seen.append(ahead.run.id)
            holder.end()

        measuring = job_of(ray, *make_run(root, "needs-them", STANDIN_SECONDS="600"), kind="evaluation", turn=True)
        assert measuring.start(waiting)
    assert seen == [first.id]
    assert cluster_holder(ray, first).job == measuring.id
    measuring.end()


def test_what_takes_a_turn():
    @dataclass
    class Cluster:
        """Of nodes with what Ray says of them."""

        resources: dict[str, float]

        def nodes(self):
            return [{"resources_total": {"CPU": 8.0}}, {"resources_total": self.resources}]

    gpus, npus, cpus = Cluster({"GPU": 8.0}), Cluster({"NPU": 16.0}), Cluster({"CPU": 8.0})
    answers = [
        [takes_turn(RunConfig(device=kind), one) for one in (gpus, npus, cpus)] for kind in ("auto", "cpu", "cuda")
    ]
    assert answers == [[True, True, False], [False, False, False], [True, True, True]]


def test_of_two_that_start_together_one_trains(ray, root):
    jobs = [job_of(ray, *make_run(root, f"twin-{n}", STANDIN_SECONDS="600")) for n in range(2)]
    waited = []

    def start(job):
        def waiting(ahead):
            waited.append((job, ahead.job))
            raise Enough

        with contextlib.suppress(Enough):
            job.start(waiting)

    threads = [threading.Thread(target=start, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [(loser, winner)] = waited
    [holder] = [job for job in jobs if job is not loser]
    assert holder.id == winner
    holder.kill()
    gone(holder)


@pytest.mark.slow
def test_who_submits_from_another_run_root_at_the_same_moment_withdraws_and_waits(ray, root, tmp_path, monkeypatch):
    first = job_of(ray, *make_run(root, "north", STANDIN_SECONDS="600"))
    run, config = make_run(tmp_path, "south")
    second = job_of(ray, run, config)
    submit = second._start

    def together():
        """Both have looked at a free cluster."""
        monkeypatch.undo()
        assert first.start()
        assert submit()
        assert cluster_holder(ray, first.run, first.id) is None, "the earlier one stays"
        return True

    monkeypatch.setattr(second, "_start", together)
    seen = []

    def waiting(other):
        seen.append(other.job)
        assert second.running() is None
        assert first.running()
        first.end()

    assert second.start(waiting)
    assert seen == [first.id]
    assert second.id.endswith("-2")
    assert [e.data["status"] for e, _ in second.follow() if e.kind == "ended"] == ["finished"]
    gone(second)


def test_it_says_who_since_when_and_how_far(tmp_path):
    run = RunFolder(tmp_path / "long-1234")
    holder = ClusterHolder("dapo-long-1234-1", run, time.time())
    assert "its folder cannot be read from here" in str(holder)
    run.root.mkdir()
    assert str(holder).endswith(time.strftime("since %H:%M", time.localtime(holder.since)))
    journal = Journal(run.journal)
    journal.append("started", 0, total_steps=100)
    assert str(holder).endswith(": before step 1 of 100")
    journal.append("step", 12, metrics={}, seconds_left=754.0)
    assert "long-1234 (job dapo-long-1234-1), which runs since" in str(holder)
    assert str(holder).endswith(": step 12 of 100, about 13 min left")
    measuring = EvaluationFolder(tmp_path)
    measuring.progress.write_text('{"done": 3, "total": 64}')
    assert str(ClusterHolder("dapo-base-1", RunFolder(tmp_path), time.time())).endswith(": prompt 3 of 64")


def test_a_flow_says_it_in_an_artifact_and_cancelling_it_works(prefect_api, tmp_path, monkeypatch):
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import State, StateType
    from prefect.runtime import flow_run

    from tasks import turn

    monkeypatch.setattr(turn, "_REPORT_AGAIN_S", 0.0)
    ahead = ClusterHolder("dapo-long-1", RunFolder(tmp_path), time.time())
    tags = []

    @flow
    def waits(cancel: bool) -> str:
        with get_client(sync_client=True) as client:
            with turn.Turn() as ours:
                ours(ahead)
                tags.append(client.read_flow_run(flow_run.id).tags)
                if cancel:
                    client.set_flow_run_state(flow_run.id, State(type=StateType.CANCELLING, name="Cancelling"))
                    end_at = time.monotonic() + 30
                    try:
                        while time.monotonic() < end_at:
                            ours(ahead)
                            time.sleep(0.2)
                    except turn.CancelledWhileWaiting as cancelled:
                        return str(cancelled)
            tags.append(client.read_flow_run(flow_run.id).tags)
            artifacts = client.read_artifacts(limit=200)
            (said,) = {str(artifact.data) for artifact in artifacts if artifact.key == turn.WAITING}
            return said

    assert waits(False) == f"Waits for {ahead}"
    assert tags == [["waiting"], []]
    assert waits(True) == f"cancelled while it waited for {ahead}"
