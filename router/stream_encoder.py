"""One request's updates as server-sent events."""

from __future__ import annotations

from .error_response import error_body, report
from .generation import Choice, Delta
from .metrics import RequestTimer
from .preparation import Job
from .responses import STREAM_END, sse_event


class StreamEncoder:
    """Writes the updates of one request as server-sent events, and takes their times."""

    def __init__(self, job: Job, timer: RequestTimer) -> None:
        self._choices = job.choices
        self._format = job.format
        self._timer = timer
        self._opened: set[int] = set()

    def event(self, update: tuple[Choice, Delta]) -> bytes:
        """The events for what a choice has gained; no bytes if that is nothing to tell yet."""
        choice, delta = update
        self._timer.update(choice.index, len(delta.tokens), delta.finish_reason)
        data = self._format.chunk(choice, delta, self._choices)
        if choice.index in self._opened:
            return data
        self._opened.add(choice.index)
        return self._format.opening(choice) + data

    def closing(self) -> bytes:
        """The events after the last update."""
        return self._format.closing(self._choices)

    def failure(self, error: Exception) -> bytes:
        """The events in place of what an error has prevented: it came too late for an HTTP status."""
        report(error)
        return sse_event(error_body(error)) + STREAM_END
