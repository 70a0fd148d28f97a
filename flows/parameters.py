"""From a flow run's parameters to the configuration to train."""

from __future__ import annotations

from typing import Any

from dapo.config import io
from dapo.config.run import RunConfig

Overrides = dict[str, Any] | list[str] | None
DEFAULT_PATH = "configs/geo3k_tiny.yaml"
_CONFIGURATION = ("config_path", "overrides", "config")


def resolve(config_path: str, overrides: Overrides = None, config: RunConfig | None = None) -> RunConfig:
    """The configuration for the flow's parameters; raises ConfigError."""
    if config is None:
        return io.load(config_path, overrides or ())
    return io.override(config, overrides or ())


def configured(parameters: dict[str, Any]) -> RunConfig:
    """The same for a flow run's parameters as Prefect stores them: plain values, and only those that were given."""
    given = {"config_path": DEFAULT_PATH} | {name: parameters[name] for name in _CONFIGURATION if name in parameters}
    if given.get("config") is not None:
        given["config"] = RunConfig.model_validate(given["config"])
    return resolve(**given)
