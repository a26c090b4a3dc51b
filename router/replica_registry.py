"""Which replicas Serve has for each deployment, as its request routers in this process are told.

Serve runs request routers in a thread of their own; whoever watches is called in that thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Watcher = Callable[[str, tuple[str, ...]], None]
"""Called with a deployment's name and the unique ids of its replicas."""

_lock = threading.Lock()
_replicas: dict[str, tuple[str, ...]] = {}
_watchers: list[Watcher] = []


def announce(deployment: str, replicas: tuple[str, ...]) -> None:
    """The replicas of `deployment` are these now."""
    with _lock:
        _replicas[deployment] = replicas
        for watcher in _watchers:
            watcher(deployment, replicas)


def watch(watcher: Watcher) -> Callable[[], None]:
    """Call `watcher` with what is known and with every change from now on, until the returned function is called."""
    with _lock:
        _watchers.append(watcher)
        for deployment, replicas in _replicas.items():
            watcher(deployment, replicas)

    def stop() -> None:
        with _lock:
            _watchers.remove(watcher)

    return stop
