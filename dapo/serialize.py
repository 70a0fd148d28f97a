"""Rollout groups as plain JSON values and back, exactly: for checkpoints and recordings, without pickle."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

from dapo.types import (
    Completion,
    Crashed,
    FinishReason,
    Outcome,
    Prompt,
    Rollout,
    RolloutGroup,
    Scored,
    TimedOut,
    Truncated,
)


def group_to_plain(group: RolloutGroup) -> dict[str, Any]:
    """Dicts, lists, strings and numbers only; JSON keeps every float to the last bit."""
    return {
        "prompt": prompt_to_plain(group.prompt),
        "rollouts": [_rollout_to_plain(rollout) for rollout in group.rollouts],
        "rewards": list(group.rewards),
        "serial": group.serial,
    }


def group_from_plain(plain: Mapping[str, Any]) -> RolloutGroup:
    """The inverse of `group_to_plain`, also after a trip through JSON."""
    return RolloutGroup(
        prompt=prompt_from_plain(plain["prompt"]),
        rollouts=tuple(_rollout_from_plain(rollout) for rollout in plain["rollouts"]),
        rewards=tuple(plain["rewards"]),
        serial=plain["serial"],
    )


def prompt_to_plain(prompt: Prompt) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "token_ids": list(prompt.token_ids),
        "images": [base64.b64encode(image).decode() for image in prompt.images],
        "image_grids": [list(grid) for grid in prompt.image_grids],
        "answer": prompt.answer,
        "question": prompt.question,
        "data_source": prompt.data_source,
        "tags": list(prompt.tags),
    }


def prompt_from_plain(plain: Mapping[str, Any]) -> Prompt:
    lists = {
        "token_ids": tuple(plain["token_ids"]),
        "images": tuple(base64.b64decode(image) for image in plain["images"]),
        "image_grids": tuple((t, h, w) for t, h, w in plain["image_grids"]),
        "tags": tuple(plain["tags"]),
    }
    return Prompt(**{**plain, **lists})


def completion_to_plain(completion: Completion) -> dict[str, Any]:
    return {
        "token_ids": list(completion.token_ids),
        "logprobs": list(completion.logprobs),
        "finish_reason": completion.finish_reason.value,
        "policy_version": completion.policy_version,
        "versions": [list(segment) for segment in completion.versions],
        "experts": base64.b64encode(completion.experts).decode(),
    }


def completion_from_plain(plain: Mapping[str, Any]) -> Completion:
    return Completion(
        token_ids=tuple(plain["token_ids"]),
        logprobs=tuple(plain["logprobs"]),
        finish_reason=FinishReason(plain["finish_reason"]),
        policy_version=plain["policy_version"],
        versions=tuple((version, count) for version, count in plain["versions"]),
        experts=base64.b64decode(plain["experts"]),
    )


def _rollout_to_plain(rollout: Rollout) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt_id,
        "sample": rollout.sample,
        "completion": completion_to_plain(rollout.completion),
        "outcome": {"kind": type(rollout.outcome).__name__} | dataclasses.asdict(rollout.outcome),
        "text": rollout.text,
    }


def _rollout_from_plain(plain: Mapping[str, Any]) -> Rollout:
    return Rollout(
        prompt_id=plain["prompt_id"],
        sample=plain["sample"],
        completion=completion_from_plain(plain["completion"]),
        outcome=_outcome_from_plain(plain["outcome"]),
        text=plain["text"],
    )


def _outcome_from_plain(plain: Mapping[str, Any]) -> Outcome:
    values = {name: value for name, value in plain.items() if name != "kind"}
    match plain["kind"]:
        case "Scored":
            return Scored(**values)
        case "TimedOut":
            return TimedOut(**values)
        case "Crashed":
            return Crashed(**values)
        case "Truncated":
            return Truncated(Scored(**values["scored"]))
    raise ValueError(f"outcome kind {plain['kind']!r} is not one of Scored, TimedOut, Crashed, Truncated")
