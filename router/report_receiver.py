"""Where the replicas' reports arrive at an ingress.

    LoadReporter of a replica ── PUSH ──▶ PULL ── ReplicaReport ──▶ on_report: load, accepted requests
                                                              └──▶ PrefixIndex: blocks

Every report has a number. If one is missing, the replica's blocks are taken from a snapshot, which `on_gap` has to ask
for; until it comes, what the index knows of the replica stays as it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..cluster.block_hash import SHORT_BITS
from ..cluster.replica_report import ReplicaReport
from .message_receiver import MessageReceiver
from .prefix_index import PrefixIndex

logger = logging.getLogger(__name__)

ASK_SECONDS = 1.0
"""Between two times that `on_gap` is called for the same replica."""
SILENCE_SECONDS = 2.5
"""Replicas with nothing to say repeat themselves twice a second; after so long something is wrong."""
WORK_SECONDS = 0.001
"""So long the index takes blocks in before other tasks get their turn."""
_BACKLOG = 64
"""Changes of the index that wait; as many more, and they get as much more time."""
_PART = 2048
"""Blocks that the index takes in at once, in about half a millisecond."""

_Hashes = NDArray[np.int64]
_HASH_MASK = np.int64((1 << SHORT_BITS) - 1)


class _Sender:
    """What is known of one replica's reports."""

    def __init__(self, model: str, now: float) -> None:
        self.model = model
        self.heard = now
        self.number: int | None = None
        """Of the last report in the unbroken row since a snapshot; None: a snapshot is missing."""
        self.asked = -float("inf")


class ReportReceiver:
    """Receives reports, keeps the index up to date and notices lost reports. Use it on one event loop.

    Args:
        host: loopback or the node's Ray address.
        index: gets the replicas' blocks. Large snapshots are taken in bit by bit, between other tasks.
        on_report: gets every report that is not a repeated one: its load counts even if blocks are missing.
        on_gap: called with model and replica to subscribe again, at most once a second for each.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        host: str,
        index: PrefixIndex,
        on_report: Callable[[ReplicaReport], None],
        on_gap: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._on_report = on_report
        self._on_gap = on_gap
        self._clock = clock
        self._senders: dict[str, _Sender] = {}
        self._work: deque[Callable[[], None]] = deque()
        self._decoder = msgspec.msgpack.Decoder(ReplicaReport)
        self._receiver = MessageReceiver(host, self._take)
        self.endpoint = self._receiver.endpoint

    def start(self) -> None:
        """Begin to read, on the running event loop. Calling it again does nothing."""
        self._receiver.start()

    def close(self) -> None:
        """Stop reading and free the port."""
        self._work.clear()
        self._receiver.close()

    def forget(self, replica: str) -> None:
        """The replica is gone."""
        self._senders.pop(replica, None)
        self._do(partial(self._index.remove, replica))

    def is_current(self, replica: str) -> bool:
        """Whether the index has, or is about to have, everything that the replica has reported."""
        sender = self._senders.get(replica)
        return sender is not None and sender.number is not None

    def silence(self, replica: str) -> float:
        """Seconds since the replica's last report; infinite if there was none."""
        sender = self._senders.get(replica)
        return float("inf") if sender is None else self._clock() - sender.heard

    def watch(self) -> None:
        """Ask replicas that are silent for a sign of life, through `on_gap`. Call it about twice a second."""
        for replica, sender in list(self._senders.items()):
            if self._clock() - sender.heard > SILENCE_SECONDS:
                self._ask(replica, sender)

    # --- one report -----------------------------------------------------------------------------------------------

    def _take(self, message: bytes) -> None:
        try:
            report = self._decoder.decode(message)
            stored, evicted = _hashes(report.stored), _hashes(report.evicted)
        except (msgspec.MsgspecError, ValueError) as error:
            logger.error("dropped a malformed report of %d bytes: %s", len(message), error)
            return
        replica = report.replica
        sender = self._senders.get(replica)
        if sender is None:
            sender = self._senders[replica] = _Sender(report.model, self._clock())
        sender.heard = self._clock()
        if sender.number is not None and report.number == sender.number and not report.snapshot:
            return
        if report.snapshot:
            sender.number = report.number
            self._do(
                partial(self._index.snapshot, replica, stored[:_PART]),
                *_parts(self._index.stored, replica, stored[_PART:]),
            )
        elif sender.number is not None and report.number == sender.number + 1:
            sender.number = report.number
            self._do(
                *_parts(self._index.stored, replica, stored),
                *_parts(self._index.evicted, replica, evicted),
            )
        else:
            sender.number = None
            self._ask(replica, sender)
        self._on_report(report)

    def _ask(self, replica: str, sender: _Sender) -> None:
        now = self._clock()
        if now - sender.asked >= ASK_SECONDS:
            sender.asked = now
            self._on_gap(sender.model, replica)

    # --- the index ------------------------------------------------------------------------------------------------

    def _do(self, *changes: Callable[[], None]) -> None:
        """Change the index, after the changes that wait already."""
        idle = not self._work
        self._work.extend(changes)
        if idle:
            self._go_on()

    def _go_on(self) -> None:
        """Change the index as long as others can wait, which is longer if many changes do."""
        end = time.perf_counter() + WORK_SECONDS * (1 + len(self._work) // _BACKLOG)
        while self._work:
            if time.perf_counter() >= end:
                asyncio.get_running_loop().call_soon(self._go_on)
                return
            self._work.popleft()()


def _hashes(packed: bytes) -> _Hashes:
    """Short hashes of a report. Raises ValueError if the last one is cut off."""
    return np.frombuffer(packed, "<i8").astype(np.int64, copy=False) & _HASH_MASK


def _parts(change: Callable[[str, _Hashes], None], replica: str, hashes: _Hashes) -> list[Callable[[], None]]:
    return [partial(change, replica, hashes[start : start + _PART]) for start in range(0, len(hashes), _PART)]
