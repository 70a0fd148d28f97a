"""The few errors a user meets. Each says what, where, which value, why, and what to do next.

All are picklable (they cross Ray and multiprocessing): one message argument, no custom ``__init__``.
"""


class DapoError(Exception):
    """Root of the errors this package raises on purpose."""


class ConfigError(DapoError, ValueError):
    """The configuration cannot be run as written; the message names the key, the value and a remedy."""


class DataError(DapoError, ValueError):
    """A data set, a row or a prompt is not usable; the message names the place and the reason."""


class WeightsError(DapoError):
    """Model weights are missing, partial or do not fit the code that loads them."""


class EnvironmentCheckError(DapoError):
    """The machine or cluster cannot run this configuration; lists every failed check with its remedy."""


class EngineError(DapoError):
    """The generation engine died, hung, or returned what no engine may return."""


class ProofError(DapoError):
    """The engine does not hold the trainer's weights, or does not compute with them: nothing may be trained on what it
    writes, and a restart would not help. The message names the first wrong tensor, or the gap of the probe."""


class RewardError(DapoError):
    """The reward function is broken (not: an answer is wrong); the message names the function and the cause."""


class CheckpointError(DapoError):
    """A checkpoint could not be written whole, or is not whole when read."""


class StarvationError(DapoError):
    """Dynamic sampling cannot fill a step; the message counts the reasons (all right, all wrong, failed, truncated)."""


class TrainingError(DapoError):
    """The training job failed, or crashed more often than `ray.restarts` allows; the message names its log."""


class RunStopped(DapoError):
    """The run was asked to stop (request file, signal); not a failure."""


def named(name: str, message: str, otherwise: type[DapoError] = DapoError) -> DapoError:
    """An error that came out of another process as the name of its class and its message.

    Args:
        otherwise: what it is where `name` is none of these.
    """
    kinds: list[type[DapoError]] = [DapoError, *DapoError.__subclasses__()]
    return next((kind for kind in kinds if kind.__name__ == name), otherwise)(message)
