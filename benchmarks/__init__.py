"""Measurements: each prints what it measured, next to another framework or the hardware limit in the same run."""
