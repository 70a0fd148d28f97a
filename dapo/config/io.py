"""Reading, merging and explaining configuration: YAML with `extends`, dotted overrides, one clear error each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dapo.config.run import RunConfig
from dapo.errors import ConfigError

_BOOL = "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """YAML whose only words for booleans are true and false, as in version 1.2: `kind: off` is a name, not False.

    Fields that are booleans still take on, off, yes and no: pydantic reads these words.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [(tag, words) for tag, words in known if tag != _BOOL]
        for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> RunConfig:
    """Read a YAML file (following `extends`), apply dotted overrides, validate.

    Args:
        path: the file. `extends: other.yaml` is resolved relative to it; mappings merge, everything else replaces.
        overrides: ``["train.steps=5"]`` (values are YAML) or ``{"train.steps": 5}``.

    Raises:
        ConfigError: missing file, bad YAML, unknown key (with the nearest valid name), value out of range.
    """
    tree = _read(Path(path), ())
    for key, value in _parse(overrides).items():
        _set(tree, key, value)
    return validate(tree, str(path))


def override(config: RunConfig, overrides: Iterable[str] | Mapping[str, Any]) -> RunConfig:
    """The configuration with dotted overrides, as in `load`; raises ConfigError."""
    tree = config.model_dump(mode="json")
    for key, value in _parse(overrides).items():
        _set(tree, key, value)
    return validate(tree)


def validate(tree: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """Build the tree's model; every problem in one ConfigError, one line each."""
    try:
        # On top of the defaults, so that part of a variant (`model.source.seed=1`) need not name its kind again.
        return RunConfig.model_validate(_combine(RunConfig().model_dump(), dict(tree)))
    except ValidationError as error:
        lines = [_explain(dict(e)) for e in error.errors()]
        raise ConfigError(f"{where}: " + "\n  ".join(lines)) from None


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved tree; the file alone is enough to repeat the run."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `extends` goes round in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise ConfigError(f"no configuration file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read configuration file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping at the top, found {type(tree).__name__}")
    parent = tree.pop("extends", None)
    return tree if parent is None else _combine(_read(path.parent / parent, (*seen, path)), tree)


def _combine(old: Any, new: Any) -> Any:
    """Mappings merge, everything else replaces; so does another `kind`, whose keys the old variant does not have."""
    if not isinstance(old, dict) or not isinstance(new, dict) or new.get("kind", old.get("kind")) != old.get("kind"):
        return new
    return {**old, **{key: _combine(old.get(key), value) for key, value in new.items()}}


def _parse(overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(overrides, Mapping):
        return dict(overrides)
    out: dict[str, Any] = {}
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {item!r} is not of the form key.subkey=value, for example train.steps=5")
        try:
            out[key] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: the value is not valid YAML: {error}") from None
    return out


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: {part} is a value, not a section")
        tree = child
    if last == "kind" and tree.get("kind") != value:
        tree.clear()  # the old variant's keys do not belong to the new one
    tree[last] = _combine(tree.get(last), value)


def _explain(error: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    key, value = ".".join(path), error.get("input")
    if error["type"] == "extra_forbidden":
        names = _names_at(path[:-1])
        near = difflib.get_close_matches(path[-1], names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"valid names here: {', '.join(names)}"
        return f"unknown key {key}; {hint}"
    if error["type"] == "value_error":
        message = str(error["msg"]).removeprefix("Value error, ")
        return message if not key else f"{key}: {message}"
    return f"{key}={value!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _names_at(path: list[str]) -> list[str]:
    """Valid keys of the section a path leads to; tags of unions in the path choose the variant."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in path:
        variants = [m for m in models if _kind(m) == part]
        if variants:
            models = variants
            continue
        found = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [m for annotation in found for m in _models_in(annotation)]
    return sorted({name for m in models for name in m.model_fields})


def _kind(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return None if kind is None else kind.default


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]
