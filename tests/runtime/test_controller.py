"""The run as a whole, on small deterministic stand-ins: order, exactly-once, resuming, stopping, failing."""

import pytest

from dapo.errors import CheckpointError, EngineError, ProofError, RewardError
from dapo.observe.journal import read
from dapo.rollout.verification import compare_fingerprints
from tests.runtime.fakes import Judge, ScriptedEngine, kinds, make, without_checkpoints


def test_a_run_validates_trains_saves_and_ends_in_order(tmp_path):
    controller, policy, folder = make(tmp_path)
    assert controller.run() == "finished"
    assert without_checkpoints(folder) == [
        ("validation", 0), ("step", 1), ("step", 2), ("validation", 2),
        ("step", 3), ("step", 4), ("validation", 4), ("ended", 4),
    ]  # fmt: skip
    assert kinds(folder)[-2:] == [("checkpoint", 4), ("ended", 4)]
    assert len(policy.trained) == 8  # 4 steps of 4 / 2 updates
    assert all(len(update) == 2 for update in policy.trained)
    metrics = next(e for e in read(folder.journal) if e.kind == "step").data["metrics"]
    assert metrics["groups/trained"] == 4
    assert 0 < metrics["reward/accuracy"] < 1
    assert (folder.checkpoint(4) / "hf" / "model.txt").exists()


def test_only_groups_with_right_and_wrong_answers_are_trained_on(tmp_path):
    controller, _, _ = make(tmp_path, skill=0.8)
    seen = []
    take = controller.sampling.buffer.take
    controller.sampling.buffer.take = lambda: seen.extend(found := take()) or found
    controller.run()
    assert len(seen) == 16
    assert all(0 < group.num_correct < 4 for group in seen)


def test_a_killed_run_continues_to_the_same_end(tmp_path):
    straight, straight_policy, straight_folder = make(tmp_path / "straight")
    straight.run()
    killed, _, folder = make(tmp_path / "killed")
    step = killed.step

    def die_in_step_four():
        if killed.at.step == 3:
            killed.checkpoints.finish()
            raise KeyboardInterrupt
        step()

    killed.step = die_in_step_four
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    again, policy, _ = make(tmp_path / "killed")
    assert again.run() == "finished"
    assert without_checkpoints(folder) == without_checkpoints(straight_folder)
    assert sorted(kinds(folder)) == sorted(kinds(straight_folder))
    assert policy.skill == straight_policy.skill
    # Steps 3 and 4 are redone from checkpoint 2 with the very prompts that an uninterrupted run trains on.
    assert policy.trained == straight_policy.trained[4:]

    def learned(where):
        names = ("reward/mean", "groups/kept", "groups/generated", "response/length_mean")
        return [[e.data["metrics"][n] for n in names] for e in read(where.journal) if e.kind == "step"]

    assert learned(folder) == learned(straight_folder)


def test_a_finished_run_started_again_does_nothing_twice(tmp_path):
    make(tmp_path)[0].run()
    controller, policy, folder = make(tmp_path)
    before = kinds(folder)
    assert controller.run() == "finished"
    assert policy.trained == []
    assert kinds(folder)[: len(before)] == before


def test_a_stop_request_saves_a_checkpoint_first_and_the_run_goes_on_later(tmp_path):
    controller, _, folder = make(tmp_path, train={"save_freq": 0})
    step = controller.step

    def ask_after_three():
        step()
        if controller.at.step == 3:
            folder.stop_request.write_text("cancelled by a test")

    controller.step = ask_after_three
    assert controller.run() == "stopped"
    assert kinds(folder)[-2:] == [("checkpoint", 3), ("ended", 3)]
    folder.stop_request.unlink()
    again, policy, _ = make(tmp_path, train={"save_freq": 0})
    assert again.run() == "finished"
    assert len(policy.trained) == 2


def test_an_engine_that_dies_is_restarted_and_the_round_redone(tmp_path):
    healthy, healthy_policy, _ = make(tmp_path / "a")
    healthy.run()
    controller, policy, folder = make(tmp_path / "b", engine=ScriptedEngine(fail_at=(3,)))
    assert controller.run() == "finished"
    assert controller.engine.restarts == 1
    assert policy.trained == healthy_policy.trained
    alarms = [e.data["name"] for e in read(folder.journal) if e.kind == "alarm"]
    assert alarms == ["engine_restarted"]
    assert restarts(folder) == [1, 1, 1, 1]


def restarts(folder):
    return [e.data["metrics"]["engine/restarts"] for e in read(folder.journal) if e.kind == "step"]


def test_restarts_are_counted_over_all_attempts(tmp_path):
    make(tmp_path, engine=ScriptedEngine(fail_at=(3,)), train={"steps": 2})[0].run()
    controller, _, folder = make(tmp_path, engine=ScriptedEngine(fail_at=(2,)))
    controller.run()
    assert restarts(folder) == [1, 1, 2, 2]


def test_an_engine_that_keeps_dying_ends_the_run(tmp_path):
    controller, _, _ = make(tmp_path, engine=ScriptedEngine(fail_at=tuple(range(2, 20))))
    with pytest.raises(EngineError, match="died"):
        controller.run()
    assert controller.engine.restarts == controller.config.rollout.restarts


def test_an_engine_that_computes_with_other_weights_stops_the_run_before_it_trains(tmp_path):
    controller, policy, _ = make(tmp_path, engine=ScriptedEngine(stale=True))
    with pytest.raises(ProofError, match=r"log-prob probe after the start: .* differ by 1 nats .* other weights"):
        controller.run()
    assert policy.trained == []
    assert controller.engine.restarts == 0


def test_an_engine_whose_weights_are_damaged_in_any_step_stops_the_run_in_that_step(tmp_path):
    controller, policy, _ = make(tmp_path)
    sync = policy.sync

    def damaged(version):
        controller.engine.logprob = -1.5 if version == 3 else -0.5
        return sync(version)

    policy.sync = damaged
    with pytest.raises(ProofError, match="log-prob probe after the sync of step 3"):
        controller.run()


def test_a_broken_reward_stops_the_run_and_is_never_a_zero(tmp_path):
    controller, policy, _ = make(tmp_path, judge=Judge(broken=True), validation={"before_training": False})
    with pytest.raises(RewardError, match="dapo reward test"):
        controller.run()
    assert policy.trained == []


def test_a_checkpoint_that_cannot_be_written_is_tried_again_after_the_next_step(tmp_path):
    controller, policy, folder = make(tmp_path)
    calls = []

    def full_at_first(*, wait):
        calls.append(wait)
        if len(calls) == 1:
            raise CheckpointError("No space left on device")
        return True

    policy.written = full_at_first
    assert controller.run() == "finished"
    assert sorted(step for kind, step in kinds(folder) if kind == "checkpoint") == [3, 4]
    alarms = [(e.step, e.data["name"]) for e in read(folder.journal) if e.kind == "alarm"]
    assert alarms == [(2, "checkpoint_failed")]


def test_a_run_whose_last_checkpoint_cannot_be_written_fails_with_that_error(tmp_path):
    controller, policy, folder = make(tmp_path, train={"save_freq": 0})

    def full(*, wait):
        raise CheckpointError("No space left on device")

    policy.written = full
    with pytest.raises(CheckpointError, match=r"step 4 could not be written .*No space left"):
        controller.run()
    assert not list(folder.checkpoints.iterdir())


def test_an_error_waits_for_the_checkpoint_on_its_way(tmp_path):
    controller, _, folder = make(tmp_path)
    step = controller.step

    def die_in_step_three():
        if controller.at.step == 2:
            raise RewardError("broken")
        step()

    controller.step = die_in_step_three
    with pytest.raises(RewardError):
        controller.run()
    assert kinds(folder)[-1] == ("checkpoint", 2)


def test_starvation_stops_with_the_reasons_and_a_checkpoint(tmp_path):
    controller, policy, folder = make(tmp_path, questions=4000, train={"save_freq": 1})
    step = controller.step

    def too_easy_after_two():
        if controller.at.step == 2:
            policy.skill = controller.engine.skill = 1.0
        step()

    controller.step = too_easy_after_two
    assert controller.run() == "stopped"
    ended = list(read(folder.journal))[-1]
    assert ended.data["status"] == "stopped"
    assert "all right" in ended.data["reason"]
    assert folder.checkpoint(2).exists()
    assert "starvation" in [e.data["name"] for e in read(folder.journal) if e.kind == "alarm"]


def test_data_that_runs_out_ends_the_run_early(tmp_path):
    controller, _, folder = make(tmp_path, questions=12, train={"steps": 50, "epochs": 1})
    assert controller.run() == "finished"
    assert 1 <= controller.at.step < 50
    assert folder.checkpoint(controller.at.step).exists()


def test_kl_in_reward_lowers_rewards_before_the_advantage(tmp_path):
    controller, _, folder = make(tmp_path / "kl", algorithm={"kl": {"reward_coef": 0.1, "kind": "k1"}})
    controller.run()
    plain, _, plain_folder = make(tmp_path / "plain")
    plain.run()
    first = [next(e for e in read(f.journal) if e.kind == "step").data["metrics"] for f in (folder, plain_folder)]
    # Two tokens per response, each 0.25 nats above the reference.
    assert first[0]["reward/mean"] == pytest.approx(first[1]["reward/mean"] - 0.1 * 2 * 0.25)


def test_the_cache_wakes_only_after_the_weights_arrived(tmp_path):
    controller, policy, _ = make(tmp_path, train={"steps": 1})
    sync, calls = policy.sync, []
    policy.sync = lambda version: calls.append("sync") or sync(version)
    controller.engine.sleep = lambda: calls.append("sleep")
    controller.engine.wake = lambda: bool(calls.append("wake"))
    assert controller.run() == "finished"
    assert calls == ["sync", "wake", "sleep", "sync", "wake"]


@pytest.mark.parametrize(("freed", "alarms"), [(3_000_000_000, []), (0, ["sleep_freed_nothing"]), (None, [])])
def test_what_a_sleep_frees_is_logged_and_nothing_is_an_alarm(tmp_path, freed, alarms):
    controller, _, folder = make(tmp_path, train={"steps": 1})
    controller.engine.sleep = lambda: freed
    assert controller.run() == "finished"
    [step] = [e for e in read(folder.journal) if e.kind == "step"]
    assert step.data["metrics"].get("engine/sleep_freed_gb") == (None if freed is None else freed / 1e9)
    assert [e.data["name"] for e in read(folder.journal) if e.kind == "alarm"] == alarms


def test_an_engine_that_slept_proves_itself_in_every_step(tmp_path):
    controller, _, folder = make(tmp_path, rollout={"probe_every": 0})
    controller.engine.wake = lambda: controller.at.step > 1
    assert controller.run() == "finished"
    steps = [e for e in read(folder.journal) if e.kind == "step"]
    assert ["engine/probe_mean" in e.data["metrics"] for e in steps] == [False, True, True, True]


@pytest.mark.parametrize("devices", [0, 1])
def test_an_engine_that_dies_in_a_sync_is_replaced_and_gets_everything(tmp_path, devices):
    controller, policy, folder = make(tmp_path, rollout={"devices": devices})
    sync, versions = policy.sync, []

    def die_twice(version):
        versions.append(version)
        if versions in ([0, 1], [0, 1, 1]):
            raise EngineError("an engine left the group")
        return sync(version)

    policy.sync = die_twice
    assert controller.run() == "finished"
    assert versions == [0, 1, 1, 1, 2, 3, 4]
    assert controller.engine.restarts == 2
    assert [e.data["name"] for e in read(folder.journal) if e.kind == "alarm"] == ["engine_restarted"] * 2


@pytest.mark.parametrize("devices", [0, 1])
@pytest.mark.parametrize("fail_at", [(1,), (4,), (1, 2)])  # the probe after the start, the one after step 1
def test_an_engine_that_dies_in_a_probe_is_replaced_and_probed_again(tmp_path, devices, fail_at):
    rollout = {"devices": devices, "probe_every": 1}
    controller, _, folder = make(tmp_path, engine=ScriptedEngine(fail_at=fail_at), rollout=rollout)
    assert controller.run() == "finished"
    assert controller.engine.restarts == len(fail_at)
    steps = [e for e in read(folder.journal) if e.kind == "step"]
    assert all(e.data["metrics"]["engine/probe_mean"] == 0 for e in steps)


def test_an_engine_that_dies_in_every_probe_ends_the_run(tmp_path):
    controller, _, _ = make(tmp_path, engine=ScriptedEngine(fail_at=tuple(range(1, 20))))
    with pytest.raises(EngineError, match="died"):
        controller.run()
    assert controller.engine.restarts == controller.config.rollout.restarts


@pytest.mark.parametrize("fails", [1, 2])
def test_an_engine_that_does_not_start_again_is_tried_again_within_the_budget(tmp_path, fails):
    controller, _, _ = make(tmp_path, engine=ScriptedEngine(fail_at=(3,)))
    restart = controller.engine.restart

    def memory_is_not_free_yet():
        restart()
        if controller.engine.restarts <= fails:
            raise EngineError("vLLM refuses to start")

    controller.engine.restart = memory_is_not_free_yet
    if fails < controller.config.rollout.restarts:
        assert controller.run() == "finished"
        assert controller.engine.restarts == fails + 1
        return
    with pytest.raises(EngineError, match="refuses to start"):
        controller.run()


@pytest.mark.parametrize("devices", [0, 1])
def test_a_mismatch_stops_the_run_without_a_restart(tmp_path, devices):
    controller, policy, _ = make(tmp_path, rollout={"devices": devices})

    def lose_one(version):
        compare_fingerprints(trainer={"a": 1.0, "b": 2.0}, engine={"a": 1.0, "b": 1.0})

    policy.sync = lose_one
    with pytest.raises(ProofError, match="weight sync: b did not arrive"):
        controller.run()
    assert controller.engine.restarts == 0


def test_time_between_two_steps_is_told_with_the_later_one(tmp_path):
    controller, _, folder = make(tmp_path, train={"steps": 4, "test_freq": 1, "save_freq": 2})
    controller.run()
    timed = {e.step: set(e.data["metrics"]) for e in read(folder.journal) if e.kind == "step"}
    assert {step for step, names in timed.items() if "time/validate" in names} == {1, 2, 3, 4}
    assert {step for step, names in timed.items() if "time/checkpoint" in names} == {3}
    assert not any(
        name.startswith("time/ms_per_token/") for name in timed[3] if name.endswith(("validate", "checkpoint"))
    )
