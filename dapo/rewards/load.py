"""From `module:name` to a reward one can call."""

from __future__ import annotations

import difflib
import importlib
from typing import Protocol

from dapo.errors import ConfigError
from dapo.types import Scored


class Reward(Protocol):
    """A user's reward. Runs in a worker process with a deadline; raising is `Crashed`, never a zero."""

    def __call__(self, response: str, answer: str) -> Scored | bool | float:
        """Judge one response against the ground truth. A bool (or 0.0 / 1.0) is an accuracy alone."""
        ...


def load(function: str) -> Reward:
    """Import a user's reward: a function, or a class that is made once without arguments and then called.

    Raises:
        ConfigError: names what is wrong with `reward.function` and what to write instead.
    """
    where = f"reward.function={function!r}"
    module_name, sign, name = function.partition(":")
    if not (module_name and sign and name):
        raise ConfigError(f"{where} is not of the form module:name, for example dapo.rewards.geometry3k:grade")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        hint = "is it installed, or in the folder the run starts from?" if isinstance(error, ImportError) else "fix it"
        raise ConfigError(f"{where}: importing {module_name} raised {type(error).__name__}: {error}; {hint}") from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "check the spelling"
        raise ConfigError(f"{where}: {module_name} has no {name!r}; {hint}")
    found = getattr(module, name)
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:  # likewise its constructor
            raise ConfigError(
                f"{where}: {name}() raised {type(error).__name__}: {error}; a reward class is made without arguments"
            ) from error
    if not callable(found):
        raise ConfigError(
            f"{where} is a value of type {type(found).__name__}; needed is a function (response, answer), "
            "or a class whose instances can be called like one"
        )
    reward: Reward = found
    return reward
