"""Server-sent events from a byte stream, cut anywhere (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

from ...cluster.errors import EngineError

MAX_EVENT_BYTES = 16 * 2**20


class EventParser:
    """Takes bytes as they arrive and gives the `data` of every event that is complete.

    Bytes are never decoded here, so a character may be divided between two chunks. Only `data` fields matter to the
    OpenAI API; comments and other fields are skipped.
    """

    __slots__ = ("_after_cr", "_data", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads of the events that end in `data`.

        Raises:
            EngineError: a line does not end within `MAX_EVENT_BYTES`.
        """
        if self._after_cr or b"\r" in data:
            data = self._with_line_feeds(data)
        if self._rest:
            data = self._rest + data
        *lines, self._rest = data.split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EngineError(f"a line of the stream is longer than {MAX_EVENT_BYTES} bytes")
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data: "):
                self._data.append(line[6:])
            elif line.startswith(b"data:"):
                self._data.append(line[5:])
        return events

    def _with_line_feeds(self, data: bytes) -> bytes:
        """`data` with every CR LF and CR as LF; a CR that ended the chunk before belongs to an LF that begins this."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
