"""Nothing that decides a result is left out of the digest that says whether the code is the same."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dapo
from dapo.eval.evaluate import MEASURING_CODE
from dapo.observe.manifest import TRAINING_CODE

PACKAGE = Path(dapo.__file__).parent
# Errors' words, what is logged and shown, a library made importable.
DECIDES_NOTHING = ("__init__.py", "errors.py", "observe", "torchvision_cpu.py")


@pytest.mark.parametrize(
    ("entries", "parts", "besides"),
    [
        # What is measured on the way says how good the policy is, and changes nothing about it.
        (("runtime.job",), TRAINING_CODE, ("eval",)),
        # The configuration's values are compared themselves; of the algorithm only how a group is judged is used.
        (
            ("runtime.generation", "runtime.prompts", "rollout.factory", "rewards.pool", "eval.results"),
            MEASURING_CODE,
            ("algo", "config"),
        ),
    ],
    ids=["training", "measuring"],
)
def test_all_code_that_is_imported_is_digested_or_decides_nothing(entries, parts, besides) -> None:
    known = (*parts, *besides, *DECIDES_NOTHING)
    assert not [name for name in _closure(entries) if not any(f"{name}/".startswith(f"{part}/") for part in known)]
    assert not [part for part in parts if not (PACKAGE / part).exists()]


def _closure(entries: tuple[str, ...]) -> list[str]:
    """Files of our package, relative to it, that these modules import, directly or not."""
    found: set[Path] = set()
    todo = [f"dapo.{name}" for name in entries]
    while todo:
        stem = PACKAGE.joinpath(*todo.pop().split(".")[1:])
        file = next((f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.is_file()), None)
        if file and file not in found:
            found.add(file)
            todo += _imports(ast.parse(file.read_text()))
    return sorted(str(file.relative_to(PACKAGE)) for file in found)


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dapo":
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        yield from _imports(node)
