"""DAPO (arXiv 2503.14476) as a pipeline: algorithm, rewards, engines, trainer; usable with no Prefect and no Ray."""

__version__ = "0.1.0"
