"""Overlong Reward Shaping (DAPO section 3.4): a soft penalty before the length limit, and a mask at it."""

from __future__ import annotations

from dapo.errors import ConfigError


def soft_overlong_penalty(length: int, *, max_length: int, buffer: int, factor: float) -> float:
    """``factor`` times R_length of DAPO equation 13: 0 until the buffer begins, then linear, -1 from the limit on.

    Args:
        length: tokens of the response.
        max_length: L_max, the response limit in tokens.
        buffer: L_cache, tokens before the limit over which the penalty grows.
        factor: the penalty at the limit; it is never below -factor, also for a response past the limit.

    Raises:
        ConfigError: the buffer is empty or longer than the response limit.
    """
    if not 0 < buffer <= max_length:
        raise ConfigError(
            f"overlong buffer of {buffer} tokens must lie between 1 and the response limit of {max_length} tokens "
            f"(algorithm.overlong.buffer_tokens, batch.max_response_tokens)"
        )
    into_buffer = length - (max_length - buffer)
    if into_buffer <= 0:
        return 0.0
    return -factor * min(into_buffer / buffer, 1.0)
