"""The configuration tree: pydantic only, no torch; importable anywhere."""
