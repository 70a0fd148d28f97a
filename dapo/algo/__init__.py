"""The algorithm: pure functions on tensors and lists. Torch is the only import; no distribution, no devices."""
