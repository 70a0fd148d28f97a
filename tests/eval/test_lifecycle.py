"""The commands of a model's life, on a real MLflow database."""

from pathlib import Path

import pytest

from dapo.cli import main
from dapo.observe.registry import CHAMPION, Registry
from dapo.observe.shipper import Shipper, tracking_uri
from dapo.runtime.cluster import free_port
from tests.eval.remembered import make_run, save_checkpoint
from tests.observe import run_folder
from tests.observe.run_folder import STEPS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, config, journal = run_folder.make(tmp_path_factory.mktemp("lifecycle"))
    save_checkpoint(folder, STEPS, 0.75, "one")
    second = save_checkpoint(folder, STEPS + 1, 0.7, "two")
    journal.append("checkpoint", STEPS + 1, path=f"checkpoints/{second.name}", metrics={}, best=False, seconds=0.1)
    Shipper(folder, config).ship()
    return folder, config, second


@pytest.fixture
def dapo(world, capsys):
    def run(*words):
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_register_promote_list_and_roll_back(world, dapo):
    folder, config, second = world
    store = ("--run-root", config.run_root)
    assert dapo("register", folder.root, "figures")[0] == 0
    code, out, _ = dapo("register", second, "figures")
    assert (code, out) == (0, f"models:/figures/2: {(second / 'hf').as_uri()}\n")
    assert dapo("promote", "figures", 1, "--reason", "the first", *store)[1] == "figures: champion is version 1\n"
    assert "was 1" in dapo("promote", "figures", 2, "--reason", "newer", *store)[1]
    out = dapo("models", "figures", *store)[1]
    assert "2  challenger" not in out
    assert "   2  champion " in out
    assert "   1  previous-champion " in out
    code, out, _ = dapo("rollback", "figures", "--reason", "too long", *store)
    assert code == 0
    assert "champion is version 1 again, was 2" in out
    assert "; too long" in dapo("models", "figures", *store)[1]
    code, _, err = dapo("rollback", "figures", *store)
    assert code == 2
    assert "dapo promote figures 2 --reason WHY" in err
    registry = Registry(tracking_uri(config), "figures")
    assert registry.require(CHAMPION).version == 1
    assert registry.require(2).tags["promoted.by_hand"] == "newer"


def test_the_page_of_a_comparison_is_named(world, dapo, tmp_path):
    folder, config, _ = world
    uri = tracking_uri(config)
    course = {"steps": 2, "gain": 0.1, "seconds": 1.0, "responses": 8, "right": 50, "mlflow": {"tracking_uri": uri}}
    make_run(tmp_path, "other", **course)
    code, out, _ = dapo("compare", folder.id, "other", "--run-root", config.run_root)
    assert code == 0
    page = out.strip().splitlines()[-1]
    assert page.startswith(f"{config.run_root}/comparisons/")
    assert "runs compared" in Path(page).read_text()
    assert "## At equal training steps" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("rollback", "nobody"), "nobody has no 'champion' in the registry"),
        (("models", "nobody"), "no model nobody is registered in"),
        (("promote", "figures", "9", "--reason", "x"), "has no 9 in the registry"),
        (("compare", "one"), "a comparison needs at least two runs"),
    ],
)
def test_what_is_not_there_is_one_sentence(world, dapo, words, sentence):
    code, _, err = dapo(*words, "--run-root", world[1].run_root)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        ("rollback", "figures"),
        ("models", "figures"),
        ("promote", "figures", "1", "--reason", "x"),
        ("compare", "a", "b"),
    ],
)
def test_an_mlflow_that_is_away_is_one_sentence(dapo, words):
    address = f"http://127.0.0.1:{free_port()}"
    code, _, err = dapo(*words, "--tracking-uri", address)
    assert code == 2
    assert f"no MLflow server answers at {address}" in err
    assert len(err.splitlines()) == 1


def test_what_mlflow_refuses_is_one_sentence(world, dapo):
    code, _, err = dapo("promote", "fig/ures", "1", "--reason", "x", "--run-root", world[1].run_root)
    assert code == 2
    assert len(err.splitlines()) == 1


def test_a_folder_that_is_no_checkpoint_and_a_missing_store_are_named(dapo, tmp_path):
    assert "is not a checkpoint of a run" in dapo("register", tmp_path, "figures")[2]
    assert "no MLflow store" in dapo("models", "figures", "--run-root", tmp_path)[2]
