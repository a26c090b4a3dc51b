"""Which model answered a session last."""

from __future__ import annotations

from collections import OrderedDict


class Sessions:
    """The last model of the most recent sessions, bounded in number."""

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._model_of: OrderedDict[str, str] = OrderedDict()

    def model_of(self, session: str) -> str | None:
        """The model that answered last; None for a session that is new or was forgotten."""
        return self._model_of.get(session)

    def record(self, session: str, model: str) -> None:
        """`model` answers the session now."""
        self._model_of[session] = model
        self._model_of.move_to_end(session)
        if len(self._model_of) > self._capacity:
            self._model_of.popitem(last=False)

    def __len__(self) -> int:
        return len(self._model_of)
