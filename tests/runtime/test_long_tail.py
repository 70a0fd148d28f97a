"""Partial rollouts and generating ahead: no prompt lost, one version behind, resumed to the same updates."""

import pytest

from dapo.data.loader import PromptLoader
from dapo.errors import EngineError
from dapo.observe.journal import read
from tests.runtime.fakes import ScriptedEngine, kinds, make

CORRECTED = {"correction": {"kind": "truncate"}}


def test_what_an_engine_had_written_when_it_died_is_kept(tmp_path):
    controller, _, _ = make(tmp_path, engine=ScriptedEngine(fail_at=(3,)))
    begun = []
    stream = controller.engine.stream
    controller.engine.stream = lambda prompts, params, before=(): (
        begun.append(before) or stream(prompts, params, before)
    )
    assert controller.run() == "finished"
    after_the_death = next(before for before in begun[3:] if before)  # the probe of the new engine begins nothing
    assert any(all(one is not None for one in group) for group in after_the_death)
    assert any(all(one is None for one in group) for group in after_the_death)


def test_partial_rollouts_lose_no_prompt_and_carry_a_version_per_segment(tmp_path):
    controller, _, _ = make(
        tmp_path, rollout={"finish_share": 0.5}, algorithm=CORRECTED, train={"steps": 6, "epochs": 1}
    )
    seen = []
    add = controller.sampling.buffer.add
    controller.sampling.buffer.add = lambda groups: seen.extend(groups) or add(groups)
    assert controller.run() == "finished"
    ids = [group.prompt.id for group in seen]
    assert len(ids) == len(set(ids))
    left_open = {group.prompt.id for group in controller.generation.open}
    asked = PromptLoader(40, controller.config.seed, 1).take(len(ids) + len(left_open))
    assert set(ids) | left_open == {f"train/{i}" for i in asked}
    continued = [r.completion for g in seen for r in g.rollouts if r.completion.versions]
    assert continued
    assert all(c.versions == ((v := c.policy_version, 1), (v + 1, 1)) for c in continued)


def test_a_killed_run_continues_its_unfinished_responses(tmp_path):
    tree = {"rollout": {"finish_share": 0.5}, "algorithm": CORRECTED}
    straight, straight_policy, _ = make(tmp_path / "straight", **tree)
    straight.run()
    first, _, _ = make(tmp_path / "killed", **tree, train={"steps": 2})
    first.run()
    assert first.generation.open
    again, policy, _ = make(tmp_path / "killed", **tree)
    assert again.run() == "finished"
    assert policy.trained == straight_policy.trained[4:]


def test_a_small_data_set_is_seen_whole_in_every_epoch_with_partial_rollouts(tmp_path):
    tree = {"algorithm": CORRECTED | {"sampling": {"revisit": 1.0}}, "train": {"steps": 50, "epochs": 6}}
    controller, _, _ = make(tmp_path, questions=6, rollout={"finish_share": 0.3}, **tree)
    seen = []
    add = controller.sampling.buffer.add
    controller.sampling.buffer.add = lambda groups: seen.extend(g.prompt.id for g in groups) or add(groups)
    controller.run()
    assert {seen.count(f"train/{i}") for i in range(6)} == {6}


AHEAD = {"rollout": {"ahead": True, "devices": 1}}


def test_generating_ahead_trains_every_step_on_groups_one_version_old(tmp_path):
    controller, policy, folder = make(tmp_path, **AHEAD)
    versions = []
    take = controller.sampling.buffer.take

    def taken():
        groups = take()
        versions.append({group.policy_version for group in groups})
        return groups

    controller.sampling.buffer.take = taken
    assert controller.run() == "finished"
    assert len(policy.trained) == 8
    assert versions[0] == {0}
    assert all(max(found) == step - 1 for step, found in enumerate(versions[1:], start=1))
    assert kinds(folder)[-2:] == [("checkpoint", 4), ("ended", 4)]


def test_a_killed_run_that_generates_ahead_trains_on_what_was_generated(tmp_path):
    straight, straight_policy, _ = make(tmp_path / "straight", **AHEAD)
    straight.run()
    stopped, _, folder = make(tmp_path / "killed", **AHEAD)
    step = stopped.step

    def ask_after_two():
        step()
        if stopped.at.step == 2:
            folder.stop_request.write_text("asked by a test")

    stopped.step = ask_after_two
    assert stopped.run() == "stopped"
    folder.stop_request.unlink()
    again, policy, _ = make(tmp_path / "killed", **AHEAD)
    assert again.run() == "finished"
    assert policy.trained == straight_policy.trained[4:]


def test_a_stop_is_heard_while_the_next_step_is_written(tmp_path):
    controller, policy, folder = make(tmp_path, skill=0.0, **AHEAD, train={"steps": 4, "save_freq": 0})
    update, collect = policy.update, controller.sampling.collect

    def first_step(version):
        policy.skill = controller.engine.skill = 0.5
        found = collect(version)
        controller.engine.skill = 0.0  # nothing is kept from now on: the next step is never full
        return found

    def stop(batch, plan, index):
        folder.stop_request.write_text("asked by a test")
        return update(batch, plan, index)

    controller.sampling.collect, policy.update = first_step, stop
    assert controller.run() == "stopped"
    assert kinds(folder)[-2:] == [("checkpoint", 1), ("ended", 1)]


def test_restarts_ahead_of_a_step_have_the_same_budget(tmp_path):
    with pytest.raises(EngineError, match="died"):
        make(tmp_path, engine=ScriptedEngine(fail_at=(4,)), rollout=AHEAD["rollout"] | {"restarts": 0})[0].run()


def test_an_engine_that_dies_ahead_of_its_step_is_restarted_when_the_trainer_has_its_weights(tmp_path):
    healthy, healthy_policy, _ = make(tmp_path / "a", **AHEAD)
    healthy.run()
    # Calls: probe, validation, step 1, then step 2 ahead of its time.
    controller, policy, folder = make(tmp_path / "b", engine=ScriptedEngine(fail_at=(4,)), **AHEAD)
    assert controller.run() == "finished"
    assert controller.engine.restarts == 1
    alarms = [e.data["name"] for e in read(folder.journal) if e.kind == "alarm"]
    assert alarms == ["engine_restarted"]
    assert sorted(policy.trained[0]) == sorted(healthy_policy.trained[0])
    assert len(policy.trained) == 8
