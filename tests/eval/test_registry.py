"""Registration by reference, aliases and decisions in a real MLflow database."""

import json
import socket
from pathlib import Path

import pytest

from dapo.config import io
from dapo.errors import ConfigError, WeightsError
from dapo.eval import models
from dapo.eval.gate import GateConfig, decide
from dapo.eval.mlflow_records import record_decision
from dapo.eval.register import register
from dapo.eval.retrain import measuring_config, occasion, training_config
from dapo.observe.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry
from dapo.observe.run_folder import REGISTERED
from dapo.observe.shipper import Shipper, tracking_uri
from dapo.runtime import checkpoints
from tests.eval.remembered import save_checkpoint
from tests.eval.verdicts import many
from tests.observe import run_folder
from tests.observe.run_folder import STEPS

NAME = "dapo-figures"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run with two checkpoints in MLflow; both registered."""
    folder, config, journal = run_folder.make(
        tmp_path_factory.mktemp("registry"), mlflow={"registered_model": NAME, "experiment": "figures"}
    )
    first = save_checkpoint(folder, STEPS, 0.75, "one")
    second = save_checkpoint(folder, STEPS + 1, 0.8, "two")
    journal.append("checkpoint", STEPS + 1, path=f"checkpoints/{second.name}", metrics={}, best=False, seconds=0.1)
    shipper = Shipper(folder, config)
    shipper.ship()
    return folder, config, register(first, config), register(second, config), shipper


def test_a_version_says_where_its_weights_are_and_what_made_them(world):
    folder, _, first, _, shipper = world
    assert first.version == 1
    assert first.run_id == shipper.run_id
    assert first.folder == folder.checkpoint(STEPS) / "hf"
    assert first.tags["data.key"] == folder.root.parents[1].name
    assert len(first.tags["code.digest"]) == 16
    assert first.tags["metric.val/accuracy"] == "0.75"
    assert "get_model_version" in first.tags["loader"]


def test_the_loader_snippet_finds_the_folder(world):
    folder, _, first, _, _ = world
    lines = first.tags["loader"].splitlines()
    scope: dict = {}
    exec("\n".join(line for line in lines if "transformers" not in line and "from_pretrained" not in line), scope)
    assert scope["folder"] == str(folder.checkpoint(STEPS) / "hf")


def test_it_is_the_logged_model_of_the_checkpoint_not_a_second_one(world):
    folder, _, first, _, shipper = world
    client = Registry(shipper.uri, NAME).client
    experiment = client.get_run(shipper.run_id).info.experiment_id
    found = {m.model_id: m.tags["checkpoint.uri"] for m in client.search_logged_models([experiment])}
    assert len(found) == 2
    assert found[first.model_id] == (folder.checkpoint(STEPS) / "hf").as_uri()


def test_registering_the_same_weights_again_finds_them(world):
    folder, config, first, second, _ = world
    assert register(folder.checkpoint(STEPS), config) == first
    assert [v.version for v in Registry(tracking_uri(config), NAME).versions()] == [first.version, second.version]


def test_the_card_tells_what_from_what_and_how_good(world):
    folder, config, _, _, _ = world
    card = (folder.checkpoint(STEPS) / "hf" / "README.md").read_text()
    assert card == Registry(tracking_uri(config), NAME).client.get_model_version(NAME, "1").description
    for word in (f"{folder.id}, step {STEPS}", "'kind': 'synthetic'", "dapo.rewards.geometry3k:grade", "0.750"):
        assert word in card, word
    assert "\n\n\n" not in card.split("## How good")[0].split("| | |")[1], "a table has no holes"


def test_a_registered_checkpoint_is_whole_and_not_removed_as_an_old_one(world):
    folder, _, first, _, _ = world
    assert json.loads((folder.checkpoint(STEPS) / REGISTERED).read_text()) == {"model": NAME, "version": 1}
    assert checkpoints.damage(folder.checkpoint(STEPS)) is None
    old = save_checkpoint(folder, 1, 0.1, "zero")
    checkpoints.prune(folder, 1, best=None)
    assert not old.exists()
    assert (first.folder / "model.safetensors").exists()


def test_references_lead_to_the_same_weights(world):
    folder, config, first, second, shipper = world
    by_number = models.find_model(f"models:/{NAME}/1", config)
    by_path = models.find_model(str(folder.checkpoint(STEPS)), config)
    assert by_number.digest == by_path.digest == models.find_model(str(first.folder), config).digest
    assert by_number.run_id == by_path.run_id == shipper.run_id
    assert models.find_model(str(second.folder), config).digest != by_path.digest
    # Only the first checkpoint was validated, so it represents the run.
    assert models.find_model(str(folder.root), config).digest == by_path.digest
    assert models.find_model("base", config).source == config.model.source


@pytest.mark.parametrize(
    ("reference", "error", "words"),
    [
        (f"models:/{NAME}/9", ConfigError, "versions: 1, 2"),
        (f"models:/{NAME}@nobody", ConfigError, "has no 'nobody'"),
        ("models:/unheard/1", ConfigError, "versions: none"),
        ("not a model", ConfigError, "give a checkpoint, run or Hugging Face folder"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(world, reference, error, words):
    with pytest.raises(error, match=words):
        models.find_model(reference, world[1])


def test_a_folder_without_a_model_is_refused(world, tmp_path):
    with pytest.raises(WeightsError, match=r"no config\.json"):
        models.find_model(str(tmp_path), world[1])


def test_promotion_moves_aliases_and_rollback_takes_one_call(world):
    _, config, first, second, _ = world
    registry = Registry(tracking_uri(config), NAME)
    registry.challenge(first)
    registry.promote(first, over=None)
    registry.promote(first, over=None)
    assert registry.aliases() == {CHALLENGER: 1, CHAMPION: 1}
    with pytest.raises(ConfigError, match="no other was before it"):
        registry.rollback()
    registry.challenge(second)
    with pytest.raises(ConfigError, match="compared with no champion, but the champion is now version 1"):
        registry.promote(second, over=None)
    registry.promote(second, over=first)
    assert registry.aliases() == {CHALLENGER: 2, CHAMPION: 2, PREVIOUS: 1}
    assert [v.version for v in registry.rollback("it answers in French")] == [2, 1]
    assert registry.aliases() == {CHALLENGER: 2, CHAMPION: 1, PREVIOUS: 1}
    tags = registry.require(2).tags
    assert (tags["rollback.to"], tags["rollback.reason"]) == ("1", "it answers in French")
    assert tags["rollback.by"].endswith(f"@{socket.gethostname()}")
    assert tags["rollback.at"].startswith("20")


def test_a_second_rollback_does_not_bring_the_bad_model_back(world):
    """What a nervous operator types. Follows on the test above: version 2 was taken back."""
    registry = Registry(tracking_uri(world[1]), NAME)
    with pytest.raises(ConfigError, match=rf"would bring version 2 back .* dapo promote {NAME} 2 --reason WHY"):
        registry.rollback()
    assert registry.aliases()[CHAMPION] == 1


def test_a_rollback_killed_in_between_is_done_again(world, monkeypatch):
    registry = Registry(tracking_uri(world[1]), NAME)
    registry.promote(registry.require(2), over=registry.require(1))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry.client, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            registry.rollback()
    assert registry.aliases() == {CHALLENGER: 2, CHAMPION: 2, PREVIOUS: 1}
    assert [v.version for v in registry.rollback()] == [2, 1]
    assert registry.aliases()[CHAMPION] == 1


def test_a_decision_is_kept_either_way(world):
    _, config, first, second, _ = world
    registry = Registry(tracking_uri(config), NAME)
    for challenger, champion, right in ((first, None, 130), (second, first, 100)):
        decision = decide(many(200, 100), many(200, right), GateConfig()).plain()
        path = record_decision(registry, challenger, champion, decision, Path(config.run_root))
        saved = json.loads(path.read_text())
        assert saved["promote"] is (right == 130)
        assert saved["versions"] == {"champion": champion and champion.version, "challenger": challenger.version}
        assert saved["challenger"]["accuracy"] == right / 200
        assert saved["difference"]["low"] < saved["difference"]["high"] or right == 100
        tags = registry.require(challenger.version).tags
        assert tags["gate.decision"] == ("promoted" if right == 130 else "refused")
        assert tags["gate.against"] == ("1" if champion else "base")
    artifacts = {a.path for a in registry.client.list_artifacts(first.run_id, "decisions")}
    assert artifacts == {f"decisions/{NAME}-v1.json", f"decisions/{NAME}-v2.json"}


def test_training_begins_where_data_or_code_changed_or_somebody_asks(world):
    _, _, first, _, _ = world
    data, code = first.tags["data.key"], first.tags["code.digest"]
    assert occasion(None, data, code) == occasion(None, "other", "other")
    assert occasion(None, data, code).reason == "there is no champion yet"
    assert not occasion(first, data, code).train
    assert "nobody asked" in occasion(first, data, code).reason
    assert occasion(first, "other", code).reason == f"data changed: {data} -> other"
    assert occasion(first, data, "other").reason == f"training code changed: {code} -> other"
    assert occasion(first, data, code, "every Monday").reason == "every Monday"
    assert occasion(first, data, code, "every Monday").train


def test_the_next_run_starts_from_the_champion_under_its_own_name_and_seed(world):
    _, config, first, _, _ = world
    again = training_config(config, first, "0000002a")
    assert again.model.source.path == str(first.folder)
    assert (again.name, again.seed) == (f"{config.name}-retrain-0000002a", 42)
    assert again.model.optimizer == config.model.optimizer
    assert training_config(config, None, "0000002a").model == config.model
    anew = io.override(config, {"train.resume": "never"})
    assert training_config(anew, first, "0000002a") == again, "a retried flow run goes on with its training"


def test_the_gate_asks_on_the_split_that_training_does_not_look_at(world):
    config = world[1]
    assert config.data.validation_split == "test"
    measuring = measuring_config(config, overrides={"validation.samples": 8})
    assert measuring.data.validation_split == "validation"
    assert measuring.validation.samples == 8
    assert measuring.seed == config.seed
    assert measuring_config(config, "test").data.validation_split == "test"


def test_a_checkpoint_that_was_removed_is_named(world, tmp_path):
    folder, config, _, _, _ = world
    gone = save_checkpoint(folder, 9, 0.1, "three")
    version = register(gone, config)
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="which is not a model folder this machine sees"):
        models.find_model(version.reference, config)
