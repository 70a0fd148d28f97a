"""Stages with a cached result: skipped where the same code made the same before, and the folder still exists."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger

from tasks.progress import StageProgress, notify


def place_key(stage: str, content: str, cache_dir: str) -> str:
    """Cache key of a stage: what was made, by which code (both in `content`), and where: the result is a path."""
    place = hashlib.sha256(str(Path(cache_dir).resolve()).encode()).hexdigest()[:8]
    return f"{stage}-{content}-{place}"


class CachedStage:
    """A task run whose result is a folder; begins at once, in parallel with others.

    Args:
        stage: a task with a cache key made of content and code.
        arguments: given to it.
    """

    def __init__(self, stage: Task[..., str], *arguments: Any) -> None:
        self.stage, self.arguments = stage, arguments
        self._future = stage.submit(*arguments)

    def result(self) -> str:
        """The folder; made again where the cached one was removed."""
        path = self._future.result()
        if self._future.state.name != "Cached":
            return path
        log = get_run_logger()
        if not Path(path).is_dir():
            log.warning("%s: %s was made before but is gone; it is made again", self.stage.name, path)
            return self.stage.with_options(refresh_cache=True)(*self.arguments)
        reason = f"the same configuration and code made {path} before"
        log.info("%s skipped: %s", self.stage.name, reason)
        notify(StageProgress(self.stage.name, "skipped", detail=reason))
        return path
