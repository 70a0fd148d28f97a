"""The training engine: FSDP2 policy, packing, log-probabilities, checkpoints."""
