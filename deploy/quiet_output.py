"""Keeps the terminal for what the user should read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def quiet_output(log: Path) -> Iterator[TextIO]:
    """Send what this process and its libraries write to stdout and stderr to `log`; gives the way to the terminal.

    Ray prints messages of its processes from Python and from C++, so the file descriptors themselves are redirected.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with log.open("ab") as file, os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as terminal:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in zip((1, 2), saved, strict=True):
            os.dup2(original, number)
            os.close(original)
