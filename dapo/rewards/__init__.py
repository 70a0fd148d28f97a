"""Rewards are outcomes, not numbers: Scored | TimedOut | Crashed | Truncated."""
