"""Background writes, so that a training step does not wait for a disk."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread


class Background:
    """Runs writes in threads of their own; their errors are raised by `finish`."""

    def __init__(self) -> None:
        self._threads: list[Thread] = []
        self._errors: list[Exception] = []

    def start(self, write: Callable[[], None], name: str) -> None:
        """Begin `write`; it may touch nothing that the training goes on with."""

        def run() -> None:
            try:
                write()
            except Exception as error:
                self._errors.append(error)

        # A daemon: a write that waits for a rank that died must not keep this process alive.
        thread = Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def finish(self) -> None:
        """Wait for all of them; raises the first error there was, once."""
        for thread in self._threads:
            thread.join()
        errors = self._errors
        self._threads, self._errors = [], []
        if errors:
            raise errors[0]
