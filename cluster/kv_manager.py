"""Block tables of sequences, and prefix caching by chained block hashes."""

from __future__ import annotations

from collections.abc import Iterable

from .block_hash import extend_block_hashes
from .block_pool import BlockPool
from .sequence import Sequence


class KVManager:
    """Gives blocks to sequences and finds the prefixes that are in the cache already, by `cluster/block_hash.py`."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.prefix_caching = prefix_caching

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks in the cache that hold the beginning of the sequence's known tokens.

        The last known token is never taken from the cache: its logits are needed to sample the next one.
        """
        if not self.prefix_caching:
            return []
        self._hash_full_blocks(sequence)
        blocks = []
        for content in sequence.block_hashes[: (len(sequence.tokens) - 1) // self.block_size]:
            block = self.pool.find(content)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def shortage(self, sequence: Sequence, prefix: list[int]) -> int:
        """Blocks missing to hold all known tokens of a sequence that starts with `prefix`; zero or less: it fits."""
        revived = sum(self.pool.references(block) == 0 for block in prefix)
        return self.blocks_for(len(sequence.tokens)) - len(prefix) + revived - self.pool.num_unheld

    def admit(self, sequence: Sequence, prefix: list[int]) -> None:
        """Give a sequence its cached `prefix` and blocks for all its other known tokens (see `shortage`)."""
        assert not sequence.blocks, f"{sequence.request.request_id} holds blocks already"
        for block in prefix:
            self.pool.share(block)
        fresh = self.pool.allocate(self.blocks_for(len(sequence.tokens)) - len(prefix))
        assert fresh is not None, "admitted without enough blocks"
        sequence.blocks = prefix + fresh
        sequence.registered = len(prefix)
        sequence.scheduled = len(prefix) * self.block_size

    def grow(self, sequence: Sequence) -> int | None:
        """Append one block; its id, or None if every block is held."""
        blocks = self.pool.allocate(1)
        if blocks is None:
            return None
        sequence.blocks.append(blocks[0])
        return blocks[0]

    def register_full_blocks(self, sequence: Sequence) -> None:
        """Make the sequence's full blocks of known, scheduled tokens available to others.

        Scheduled is enough, computed is not needed: steps run in order, and within a step every layer writes all
        keys and values before it reads any, so whoever finds the block reads it after it was written.
        """
        if not self.prefix_caching:
            return
        full = min(sequence.scheduled, len(sequence.tokens)) // self.block_size
        if full <= sequence.registered:
            return
        self._hash_full_blocks(sequence)
        for index in range(sequence.registered, full):
            self.pool.register(sequence.blocks[index], sequence.block_hashes[index])
        sequence.registered = full

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence. What they cache stays until they are reused."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.registered = 0
        sequence.scheduled = 0

    def internal_waste(self, sequences: Iterable[Sequence]) -> float:
        """Share of the slots in held blocks that these sequences' known tokens do not fill, 0 to 1."""
        held = used = 0
        for sequence in sequences:
            held += len(sequence.blocks) * self.block_size
            used += min(len(sequence.tokens), len(sequence.blocks) * self.block_size)
        return 1 - used / held if held else 0.0

    def _hash_full_blocks(self, sequence: Sequence) -> None:
        extend_block_hashes(sequence.block_hashes, sequence.tokens, self.block_size, sequence.request.cache_salt)
