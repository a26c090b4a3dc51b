"""The sequences that hold a slot and blocks, and who gives them back when there are too few."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable
from operator import attrgetter

from .kv_manager import KVManager
from .sequence import Sequence, Status
from .tally import Tally

_BY_URGENCY = attrgetter("urgency")


class RunningSet:
    """Running sequences by urgency, so that those that yield are the last, and the first to be preempted.

    Args:
        kv: gives the blocks.
        max_num_seqs: slots.
        watermark: blocks that stay free when a sequence is admitted beside others, for those to grow.
        requeue: takes a sequence that was preempted.
    """

    def __init__(self, kv: KVManager, max_num_seqs: int, watermark: int, requeue: Callable[[Sequence], None]) -> None:
        self.sequences: list[Sequence] = []
        """Removed ones leave at the end, unless they finish: a loop that preempts goes on rightly."""
        self.tally = Tally()
        self._kv = kv
        self._slots = max_num_seqs
        self._watermark = watermark
        self._requeue = requeue
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def free_slots(self) -> int:
        """How many more sequences may run."""
        return len(self._free_slots)

    def fits(self, sequence: Sequence, prefix: list[int]) -> bool:
        """True if a waiting sequence with this cached prefix can be admitted."""
        if not self._free_slots:
            return False
        return self._kv.shortage(sequence, prefix) + (self._watermark if self.sequences else 0) <= 0

    def admit(self, sequence: Sequence, prefix: list[int]) -> None:
        """Give a sequence that `fits` a slot and blocks for all its known tokens."""
        self._kv.admit(sequence, prefix)
        sequence.status = Status.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.lacking = len(sequence.tokens) - sequence.scheduled
        self._insert(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, with its slot and blocks."""
        self.sequences.remove(sequence)
        self.tally.remove(sequence)
        self._kv.release(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def stop_yielding(self, sequence: Sequence) -> None:
        """Move a sequence to its place among those that do not yield."""
        self.sequences.remove(sequence)
        self.tally.remove(sequence)
        sequence.stop_yielding()
        self._insert(sequence)

    def grow(self, sequence: Sequence) -> int | None:
        """One more block for a running sequence, if need be from the least urgent one; None if that is itself."""
        while (block := self._kv.grow(sequence)) is None:
            victim = self.sequences[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        return block

    def make_room(self, head: Sequence, only_yielding: bool = False) -> None:
        """Preempt sequences for a waiting one that goes before them, if that makes enough room for it.

        It goes before those that are less urgent, and yield while it does not or are of a lower priority.
        """
        victims: list[Sequence] = []
        for sequence in reversed(self.sequences):
            if sequence.urgency < head.urgency or (only_yielding and not sequence.yields):
                break
            if sequence.yields <= head.yields and sequence.request.priority <= head.request.priority:
                break
            victims.append(sequence)
        if not victims:
            return
        prefix = self._kv.cached_prefix(head)
        if self._kv.shortage(head, prefix) + self._watermark > self._freed_by(victims, keeping=prefix):
            return
        for victim in victims:
            if self._free_slots and self._kv.shortage(head, self._kv.cached_prefix(head)) + self._watermark <= 0:
                return
            self._preempt(victim)

    def _insert(self, sequence: Sequence) -> None:
        insort(self.sequences, sequence, key=_BY_URGENCY)
        self.tally.add(sequence)

    def _preempt(self, victim: Sequence) -> None:
        self.remove(victim)
        self._requeue(victim)

    def _freed_by(self, victims: list[Sequence], keeping: list[int]) -> int:
        """Blocks outside `keeping` that nobody else holds."""
        held = Counter(block for victim in victims for block in victim.blocks)
        kept = set(keeping)
        return sum(self._kv.pool.references(block) == count for block, count in held.items() if block not in kept)

    def check_integrity(self) -> None:
        """Raise AssertionError unless sequences, slots, blocks and counts agree with each other."""
        holders = Counter(block for sequence in self.sequences for block in sequence.blocks)
        for block in range(self._kv.pool.num_blocks):
            held = self._kv.pool.references(block)
            assert held == holders[block], f"block {block}: {held} references, in {holders[block]} block tables"
        slots = [sequence.slot for sequence in self.sequences] + self._free_slots
        assert sorted(slots) == list(range(self._slots)), f"slots are lost or doubled: {sorted(slots)}"
        assert self.sequences == sorted(self.sequences, key=_BY_URGENCY), "running is out of order"
        self.tally.check_integrity(self.sequences)
        for sequence in self.sequences:
            name = sequence.request.request_id
            assert sequence.status is Status.RUNNING, f"{name} runs with status {sequence.status}"
            assert 0 <= sequence.scheduled <= sequence.total <= sequence.max_len, f"{name}: scheduled out of range"
            held = len(sequence.blocks)
            assert sequence.scheduled <= held * self._kv.block_size, f"{name}: scheduled past blocks"
            assert held <= self._kv.blocks_for(sequence.max_len), f"{name}: too many blocks"
            missing = len(sequence.tokens) - sequence.scheduled
            assert sequence.lacking == (missing if missing > 1 else 0), f"{name}: lacks {sequence.lacking} of {missing}"
