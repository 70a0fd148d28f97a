"""Measurements: each prints what it saw, paired with its rival or its limit in the same run."""
