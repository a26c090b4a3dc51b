"""A small parent process that lives until everything below it has ended.

Ray takes over a driver's SIGTERM and may abort it from C++. So the work is done in a child process, and the parent,
which does nothing else, turns every wish to end into the one signal that Ray leaves alone, and sweeps up afterwards:

```
troupe serve ── fork ──▶ driver ──▶ gcs_server, raylet, dashboard …
 waits, adopts orphans     └─ ends them all on SIGINT
```
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable

import psutil

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def supervise(work: Callable[[], int]) -> int:
    """Run `work` in a child process, interrupt it on SIGINT or SIGTERM, and leave no descendant behind.

    Args:
        work: returns the exit status; an interrupt reaches it as KeyboardInterrupt.

    Returns:
        What `work` returned, `INTERRUPTED`, or 1 if the child was killed.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # descendants whose parent ends become children of this process
    interrupts = 0
    child = 0

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGINT if interrupts == 1 else signal.SIGKILL)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _be_child(parent, work)
    if interrupts:  # between the handler and the fork
        os.kill(child, signal.SIGINT)
    while True:
        ended, status = os.waitpid(-1, 0)  # adopted children too: whoever waits for their end must see it
        if ended == child:
            break
    end_processes(psutil.Process().children(recursive=True))
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1


def end_processes(processes: Iterable[psutil.Process], grace_seconds: float = 3.0) -> None:
    """SIGTERM, and SIGKILL for those that are still there after the grace time."""
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=grace_seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=grace_seconds)


def _be_child(parent: int, work: Callable[[], int]) -> None:
    """Never returns."""
    status = 1
    try:
        # A group of its own: Ctrl-C at a terminal reaches the parent alone, which passes it on once.
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, _raise_interrupt)
        signal.signal(signal.SIGTERM, _raise_interrupt)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGINT)  # if the parent is killed, end just as well
        if os.getppid() == parent:
            status = work()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _raise_interrupt(number: int, frame: object) -> None:
    # One interrupt is enough; another one must not break off what the first has set off.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _prctl(option: int, value: int) -> None:
    """Linux's prctl(2); elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
