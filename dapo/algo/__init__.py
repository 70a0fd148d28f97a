"""The algorithm: pure functions on tensors and records, with torch as the only import. Explained in docs/algorithm.md.

Response tokens are flat: tensors ``[N]`` hold the tokens of ``S`` whole sequences one behind the other, without
padding, and ``sequence_ids [N]`` (int64, 0 .. S - 1) maps each token to its sequence. No ranks, devices or models here.
"""
