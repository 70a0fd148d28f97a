"""Validation and its estimates."""
