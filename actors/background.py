"""Work in a thread beside other work."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs `work`, if there is any, in a thread of its own from the beginning."""

    def __init__(self, work: Callable[[], object] | None, name: str) -> None:
        self._work = work
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if work is not None:
            # A daemon: if the other work fails, nobody waits for this one.
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Return when the work is done; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._work()
        except BaseException as error:
            self._failure = error
