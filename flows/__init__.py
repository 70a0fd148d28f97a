"""Prefect flows: how work is arranged. No torch, no ray."""
