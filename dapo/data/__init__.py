"""Rows to prompts: sources, preparation, processor, loader; the tiny synthetic task and model."""
