"""Reading configuration: `extends`, overrides, and one clear sentence per mistake."""

from pathlib import Path

import pytest
import yaml

from dapo.config import io
from dapo.errors import ConfigError


def write(folder: Path, name: str, tree: dict) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_file_extends_another_and_overrides_win(tmp_path):
    write(tmp_path, "base.yaml", {"seed": 1, "train": {"steps": 7, "save_freq": 3}})
    child = write(tmp_path, "child.yaml", {"extends": "base.yaml", "train": {"steps": 9}})
    config = io.load(child, ["train.save_freq=5", "model.optimizer.betas=[0.9, 0.95]"])
    assert (config.seed, config.train.steps, config.train.save_freq) == (1, 9, 5)
    assert config.model.optimizer.betas == (0.9, 0.95)


def test_a_saved_configuration_alone_repeats_the_run(tmp_path):
    config = io.validate({"name": "x", "algorithm": {"loss": {"kind": "cispo", "high": 3.0}}})
    io.save(config, tmp_path / "config.yaml")
    assert io.load(tmp_path / "config.yaml") == config


def test_another_kind_drops_the_old_variants_keys(tmp_path):
    base = write(tmp_path, "base.yaml", {"model": {"source": {"kind": "tiny", "warmup_steps": 5}}})
    config = io.load(base, {"model.source": {"kind": "folder", "path": "/models/x"}})
    assert config.model.source.kind == "folder"
    config = io.load(base, ["model.source.kind=hub", "model.source.repo=org/name"])
    assert config.model.source.model_dump() == {
        "kind": "hub", "repo": "org/name", "revision": "main", "endpoint": None,
    }  # fmt: skip


@pytest.mark.parametrize("word", ["off", '"off"', "'off'"])
def test_the_correction_is_turned_off_by_its_name_quoted_or_not(tmp_path, word):
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text("algorithm: {correction: {kind: mask, low: 0.1}}")
    child.write_text(f"extends: base.yaml\nalgorithm:\n  correction:\n    kind: {word}")
    assert io.load(child).algorithm.correction.kind == "off"
    assert io.load(base, [f"algorithm.correction.kind={word}"]).algorithm.correction.kind == "off"
    assert io.load(base).algorithm.correction.kind == "mask"


@pytest.mark.parametrize(
    ("word", "means"),
    [("true", True), ("False", False), ("on", True), ("off", False), ("yes", True), ("no", False)],
)
def test_a_boolean_is_written_in_any_of_its_words(tmp_path, word, means):
    base = tmp_path / "base.yaml"
    base.write_text(f"model: {{freeze_vision: {word}}}")
    assert io.load(base).model.freeze_vision is means
    assert io.load(base, [f"rollout.eager={word}"]).rollout.eager is means


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stpes=5", "unknown key train.stpes; did you mean 'steps'?"),
        ("algorithm.loss.clip.hihg=0.3", "did you mean 'high'?"),
        ("model.source.warmup_step=3", "did you mean 'warmup_steps'?"),
        ("train.steps=0", "train.steps=0: input should be greater than or equal to 1"),
        ("train.steps=many", "train.steps='many'"),
        ("batch.prompts_per_update=24", "try 16 or 32"),
        ("batch.tokens_per_pack=100", "cannot hold the longest sequence"),
        ("model.parallel.sequence_parallel=3", "must divide"),
        ("model.parallel.fsdp_size=2", "model.parallel.fsdp_size=2 must divide model.parallel.world_size=1"),
        ("rollout.tensor_parallel=2", "rollout.tensor_parallel=2 must divide model.parallel.world_size=1"),
        ("rollout.ahead=true", "give the engines devices of their own"),
        ("rollout.finish_share=0.9", "algorithm.correction.kind=truncate"),
        ("train.steps", "not of the form key.subkey=value"),
        ("name=../evil", "name='../evil'"),
        ("seed.deep=3", "seed is a value, not a section"),
    ],
)
def test_every_mistake_says_what_and_what_instead(tmp_path, override, says):
    base = write(tmp_path, "base.yaml", {"seed": 0})
    with pytest.raises(ConfigError) as error:
        io.load(base, [override])
    assert says in str(error.value)


def test_a_missing_file_names_those_that_are_there(tmp_path):
    write(tmp_path, "geo3k.yaml", {})
    with pytest.raises(ConfigError, match=r"no configuration file .*geo4k.yaml; .* has geo3k.yaml"):
        io.load(tmp_path / "geo4k.yaml")


def test_extends_in_a_circle_is_an_error(tmp_path):
    write(tmp_path, "a.yaml", {"extends": "b.yaml"})
    write(tmp_path, "b.yaml", {"extends": "a.yaml"})
    with pytest.raises(ConfigError, match="circle"):
        io.load(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["- 1", "a: [", "just words"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        io.load(tmp_path / "x.yaml")


def test_the_form_has_a_description_for_every_field():
    schema = io.RunConfig.model_json_schema()
    for name, model in {**schema["$defs"], "RunConfig": schema}.items():
        assert model.get("description"), name


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rollout.devices=2", "rollout.tensor_parallel=3"], "must divide rollout.devices=2"),
        (["rollout.devices=1", "rollout.ahead=true", "algorithm.sampling.max_staleness=0"], "are 1 policy versions"),
        (["rollout.devices=1", "rollout.ahead=true", "rollout.finish_share=0.9"], "are 2 policy versions"),
        (["rollout.finish_share=0.9", "algorithm.sampling.compat=verl"], "neither rollout.ahead nor"),
        (["rollout.finish_share=0.9", "rollout.router_replay=true"], "use one of the two"),
        (
            ["rollout.separate_process=true", "rollout.tensor_parallel=2", "model.parallel.world_size=2"],
            "sees one device",
        ),
        (["rollout.separate_process=true", "rollout.engine=transformers"], "or rollout.engine=vllm"),
    ],
)
def test_ways_of_generating_that_exclude_each_other_are_told(tmp_path, overrides, says):
    with pytest.raises(ConfigError, match=says):
        io.load(write(tmp_path, "base.yaml", {}), overrides)
