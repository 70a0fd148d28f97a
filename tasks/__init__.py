"""Prefect tasks: one verb per file, ids and paths in and out, safe to run twice."""
