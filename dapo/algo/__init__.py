"""The algorithm: pure functions on tensors and records, with torch as the only import. docs/algorithm.md reads along.

Response tokens are flat: tensors ``[N]`` hold the tokens of ``S`` whole sequences one behind the other, without
padding, and ``sequence_ids [N]`` (int64, 0 .. S - 1) says whose each is. Nothing here knows ranks, devices or models.
"""
