"""The prompts of requests that are under way: what will be in which cache soon, and which beginnings are in demand.

A replica reports a block when it is scheduled, and until then a burst of equal prompts would be spread over all
replicas, each of which would compute them anew. What is expected of a request is forgotten with its first token, when
the index has it from the replica itself, or when it ends without one: nothing that was only promised stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

STRIDE = 4
"""Only one block in so many is kept: the hash of a block stands for all before it, too."""


class OngoingPrefixes:
    """Blocks of the prompts that this ingress has sent and that have not ended."""

    def __init__(self) -> None:
        self._expected: dict[int, dict[str, int]] = {}
        """Block → replica → requests that will bring it there."""
        self._demand: dict[int, int] = {}
        """Block → requests under way that begin with it."""
        self._waiting: dict[str, tuple[str, Sequence[int]]] = {}
        """Requests without a first token."""
        self._ongoing: dict[str, Sequence[int]] = {}

    def __len__(self) -> int:
        """Requests under way."""
        return len(self._ongoing)

    def add(self, request: str, replica: str, hashes: Sequence[int]) -> None:
        """A request with these blocks goes to `replica`."""
        self.remove(request)
        hashes = hashes[STRIDE - 1 :: STRIDE]
        self._ongoing[request] = hashes
        self._waiting[request] = (replica, hashes)
        for content in hashes:
            self._demand[content] = self._demand.get(content, 0) + 1
            counts = self._expected.setdefault(content, {})
            counts[replica] = counts.get(replica, 0) + 1

    def started(self, request: str) -> None:
        """The request has its first token."""
        replica, hashes = self._waiting.pop(request, ("", ()))
        for content in hashes:
            counts = self._expected[content]
            counts[replica] -= 1
            if not counts[replica]:
                del counts[replica]
                if not counts:
                    del self._expected[content]

    def remove(self, request: str) -> None:
        """The request has ended, or was not sent."""
        self.started(request)
        for content in self._ongoing.pop(request, ()):
            self._demand[content] -= 1
            if not self._demand[content]:
                del self._demand[content]

    def extend(self, overlaps: Mapping[str, int], hashes: Sequence[int]) -> Mapping[str, int]:
        """How many leading blocks of a prompt each replica holds or will hold, given what it holds (`overlaps`)."""
        kept = hashes[STRIDE - 1 :: STRIDE]
        if not self._waiting or not kept:
            return overlaps
        extended = dict(overlaps)
        for replica in {*self._expected.get(kept[0], ()), *overlaps}:
            known = overlaps.get(replica, 0)
            count = known // STRIDE
            while count < len(kept) and replica in self._expected.get(kept[count], ()):
                count += 1
            if count * STRIDE > known:
                extended[replica] = count * STRIDE
        return extended

    def demand(self, hashes: Sequence[int], blocks: int) -> int:
        """Requests under way that have the first `blocks` blocks of a prompt in common with it, about."""
        last = blocks // STRIDE * STRIDE - 1
        return self._demand.get(hashes[last], 0) if 0 < last < len(hashes) else 0
