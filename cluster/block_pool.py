"""The KV cache's blocks: who holds which, and which prefixes they contain.

A block id means the same on every shard of a replica, so this is the only place that decides about memory. A block is

    held     one or more sequences refer to it
    cached   nobody refers to it, but it still holds a known prefix and can be taken back by its hash
    free     nobody refers to it and its content means nothing

Cached and free blocks form one queue in the order of their reuse: free ones first, then cached ones, least recently
used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from .step import NULL_BLOCK


class BlockPool:
    """Reference counts, content hashes and reuse order of `num_blocks` blocks.

    Block 0 is the null block and is never handed out.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs the null block and at least one more, got {num_blocks} blocks")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._events: dict[bytes, bool] | None = None
        """Contents that can be found now and could not when events were last drained (True), or the reverse (False); at
        most twice as many as blocks. None: nobody listens."""

    @property
    def capacity(self) -> int:
        """Blocks that sequences can hold."""
        return self.num_blocks - 1

    @property
    def num_unheld(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self._unheld)

    @property
    def num_held(self) -> int:
        """Blocks that at least one sequence refers to."""
        return self.capacity - len(self._unheld)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each, forgetting what they cached; None if there are too few."""
        if count > len(self._unheld):
            return None
        blocks = [self._unheld.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            content = self._hash_of[block]
            if content is not None:
                del self._block_of[content]
                self._hash_of[block] = None
                self._record(content, found=False)
        return blocks

    def find(self, content: bytes) -> int | None:
        """The block that holds the prefix with this hash."""
        return self._block_of.get(content)

    def references(self, block: int) -> int:
        """How many sequences refer to the block."""
        return self._references[block]

    def share(self, block: int) -> None:
        """Add a reference to a held or cached block."""
        if self._references[block] == 0:
            del self._unheld[block]
        self._references[block] += 1

    def register(self, block: int, content: bytes) -> None:
        """Say that a held block now holds the prefix with this hash.

        Where another block holds the same prefix already, that one stays the one to be found.
        """
        assert self._references[block] > 0, f"block {block} is not held"
        if self._hash_of[block] is None and content not in self._block_of:
            self._hash_of[block] = content
            self._block_of[content] = block
            self._record(content, found=True)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block of a sequence, given in sequence order.

        A prefix is useful without its continuation, never the other way round, so the last block is reused first.
        """
        for block in reversed(blocks):
            count = self._references[block] - 1
            assert count >= 0, f"block {block} was released more often than taken"
            self._references[block] = count
            if count == 0:
                self._unheld[block] = None
                if self._hash_of[block] is None:
                    self._unheld.move_to_end(block, last=False)

    def cached_contents(self) -> list[bytes]:
        """The hashes of all prefixes that can be found now."""
        return list(self._block_of)

    def record_events(self, on: bool) -> None:
        """Begin to record what `drain_events` returns, from now on, or stop."""
        self._events = {} if on else None

    def drain_events(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes that have become findable since the last call (or since recording began), and that have ceased to be.

        What came and went in between is in neither.
        """
        if not self._events:
            return [], []
        events, self._events = self._events, {}
        return [content for content, found in events.items() if found], [
            content for content, found in events.items() if not found
        ]

    def _record(self, content: bytes, *, found: bool) -> None:
        # An event that is there already is of the other kind, and both together are none.
        if self._events is not None and self._events.pop(content, found) == found:
            self._events[content] = found

    def check_integrity(self) -> None:
        """Raise AssertionError unless counts, queue and hash index agree."""
        assert self._references[NULL_BLOCK] == 0, "the null block is held"
        assert NULL_BLOCK not in self._unheld, "the null block can be allocated"
        for block in range(1, self.num_blocks):
            held, queued = self._references[block] > 0, block in self._unheld
            assert self._references[block] >= 0, f"block {block} has a negative count"
            assert held != queued, f"block {block}: held={held}, in the queue={queued}"
            content = self._hash_of[block]
            assert content is None or self._block_of.get(content) == block, f"block {block}: hash index disagrees"
        assert len(self._block_of) == sum(content is not None for content in self._hash_of), "hash index has strays"
        for content, found in (self._events or {}).items():
            assert (content in self._block_of) == found, f"the event of {content!r} is not its state"
