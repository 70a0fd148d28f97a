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
    prompt = group.prompt
    return {
        "prompt": {
            "id": prompt.id,
            "token_ids": list(prompt.token_ids),
            "images": [base64.b64encode(image).decode() for image in prompt.images],
            "image_grids": [list(grid) for grid in prompt.image_grids],
            "answer": prompt.answer,
            "question": prompt.question,
            "data_source": prompt.data_source,
            "tags": list(prompt.tags),
        },
        "rollouts": [_rollout_to_plain(rollout) for rollout in group.rollouts],
        "rewards": list(group.rewards),
        "serial": group.serial,
    }


def group_from_plain(plain: Mapping[str, Any]) -> RolloutGroup:
    """The inverse of `group_to_plain`, also after a trip through JSON."""
    prompt = dict(plain["prompt"])
    prompt["token_ids"] = tuple(prompt["token_ids"])
    prompt["images"] = tuple(base64.b64decode(image) for image in prompt["images"])
    prompt["image_grids"] = tuple((t, h, w) for t, h, w in prompt["image_grids"])
    prompt["tags"] = tuple(prompt["tags"])
    return RolloutGroup(
        prompt=Prompt(**prompt),
        rollouts=tuple(_rollout_from_plain(rollout) for rollout in plain["rollouts"]),
        rewards=tuple(plain["rewards"]),
        serial=plain["serial"],
    )


def _rollout_to_plain(rollout: Rollout) -> dict[str, Any]:
    completion = rollout.completion
    return {
        "prompt_id": rollout.prompt_id,
        "sample": rollout.sample,
        "completion": {
            "token_ids": list(completion.token_ids),
            "logprobs": list(completion.logprobs),
            "finish_reason": completion.finish_reason.value,
            "policy_version": completion.policy_version,
        },
        "outcome": {"kind": type(rollout.outcome).__name__} | dataclasses.asdict(rollout.outcome),
        "text": rollout.text,
    }


def _rollout_from_plain(plain: Mapping[str, Any]) -> Rollout:
    completion = plain["completion"]
    return Rollout(
        prompt_id=plain["prompt_id"],
        sample=plain["sample"],
        completion=Completion(
            token_ids=tuple(completion["token_ids"]),
            logprobs=tuple(completion["logprobs"]),
            finish_reason=FinishReason(completion["finish_reason"]),
            policy_version=completion["policy_version"],
        ),
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
