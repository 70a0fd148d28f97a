"""Law of records: what is written is what is read, to the last bit."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from dapo.serialize import group_from_plain, group_to_plain
from dapo.types import Completion, FinishReason, Prompt, Rollout, RolloutGroup, Scored, TimedOut, Truncated

texts = st.text(max_size=5)
outcomes = st.one_of(
    st.builds(Scored, st.booleans(), st.floats(allow_nan=False), st.floats(allow_nan=False), texts),
    st.builds(TimedOut, st.floats(0, 9)),
    st.builds(Truncated, st.builds(Scored, st.booleans())),
)
ids = st.lists(st.integers(0, 2**31), max_size=4).map(tuple)
prompts = st.builds(
    Prompt,
    id=texts,
    token_ids=ids,
    images=st.lists(st.binary(max_size=9), max_size=2).map(tuple),
    image_grids=st.lists(st.tuples(*[st.integers(1, 99)] * 3), max_size=2).map(tuple),
    answer=texts,
    question=texts,
    tags=st.lists(texts, max_size=2).map(tuple),
)
completions = st.builds(
    Completion,
    token_ids=ids,
    logprobs=st.lists(st.floats(allow_nan=False), max_size=4).map(tuple),
    finish_reason=st.sampled_from(FinishReason),
    policy_version=st.integers(0, 9),
    experts=st.binary(max_size=6),
)
rollouts = st.builds(
    Rollout, prompt_id=texts, sample=st.integers(0, 9), completion=completions, outcome=outcomes, text=texts
)
rewards = st.lists(st.none() | st.floats(allow_nan=False), max_size=3).map(tuple)
groups = st.builds(
    RolloutGroup,
    prompt=prompts,
    rollouts=st.lists(rollouts, max_size=3).map(tuple),
    rewards=rewards,
    serial=st.integers(0, 9),
)


@settings(max_examples=50)
@given(groups)
def test_every_record_survives_json_to_the_last_bit(record: RolloutGroup) -> None:
    assert group_from_plain(json.loads(json.dumps(group_to_plain(record)))) == record
