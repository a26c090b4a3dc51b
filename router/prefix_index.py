"""Which replica's cache holds which block, as an ingress has heard: an estimate, bounded in memory.

A block is its short hash (`cluster/block_hash.py`). The blocks lie in a hash table of numpy arrays, so that a whole
prompt is looked up in a few calls whose memory accesses overlap; a bucket is one cache line of eight hashes, and what
finds its bucket full goes into a plain dictionary.

    keys  bucket × 8   hash + 1, 0 is an empty slot
    ids   bucket × 8   number of the set of replicas that hold the block ──▶ masks[id], one bit per replica

Each set of replicas is kept once, however many blocks it holds. A replica that leaves, or begins anew with a snapshot,
takes its bit out of `alive` and is gone in no time; its blocks are cleaned away in small slices by later updates, and
only then does another replica get the bit.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_WIDTH_BITS = 3
_WIDTH = 1 << _WIDTH_BITS
"""Slots of a bucket: 64 bytes of hashes."""
_MAX_LOAD = 0.68
"""Share of the slots that `max_blocks` fill at most; at that, three of a hundred blocks find their bucket full."""
_PART = 4096
"""Blocks that are taken in at once; bounds the memory in between."""
_LOOK_AHEAD = 512
"""Blocks that are looked up at once: most prompts are known to their beginning only."""
_SLICE_SLOTS = 4096
_SLICE_MASKS = 512
"""Cleaned by one update."""
_MORE_SLICES = 32
"""Cleaned by an update that finds no room."""
_REMEMBERED_NAMES = 1024

Hashes = Sequence[int] | NDArray[np.int64]
_Array = NDArray[np.int64]


class PrefixIndex:
    """Blocks of all replicas; at most `max_blocks` of them. Use it on one event loop."""

    def __init__(self, max_blocks: int) -> None:
        if max_blocks < 1:
            raise ValueError(f"an index needs room for at least one block, got {max_blocks}")
        self.max_blocks = max_blocks
        self.num_blocks = 0
        """Blocks that take up room, those of replicas that have just left included."""
        self.dropped = 0
        """Events that were not taken in because the index was full."""
        buckets = 1 << (int(max_blocks / (_WIDTH * _MAX_LOAD))).bit_length()
        self._bucket_mask = buckets - 1
        self._keys: _Array = np.zeros((buckets, _WIDTH), np.int64)
        self._flat_keys = self._keys.reshape(-1)
        self._ids = np.zeros(buckets * _WIDTH, np.uint32)
        self._overflow: dict[int, int] = {}  # key → id
        self._max_masks = max(4096, max_blocks // 8)
        self._masks: list[int] = [0]
        self._id_of: dict[int, int] = {}
        self._free_ids: list[int] = []
        self._void = np.zeros(64, np.bool_)  # by id: no replica is left in the mask, its blocks are to be removed
        self._used = np.zeros(64, np.bool_)  # by id: a block has been seen with it in this cleaning
        self._bits: dict[str, int] = {}
        self._replica_of: list[str | None] = []  # by number of the bit
        self._alive = 0
        self._dead = 0
        self._names: dict[int, tuple[str, ...]] = {}
        self._cleaning: Iterator[None] | None = None
        self._clean_at = 1024  # masks

    # --- questions ------------------------------------------------------------------------------------------------

    def overlaps(self, hashes: Hashes) -> dict[str, int]:
        """How many leading blocks of a prompt each replica holds; replicas with none are left out."""
        found: dict[str, int] = {}
        holding, masks = self._alive, self._masks
        if not holding:
            return found
        keys = _keys_of(hashes)
        for begin in range(0, len(keys), _LOOK_AHEAD):
            ids = self._leading_ids(keys[begin : begin + _LOOK_AHEAD])
            starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist()]
            for start, mask_id in zip(starts, ids[starts].tolist(), strict=True):
                still = holding & masks[mask_id]
                if still != holding:
                    if begin + start:
                        for name in self._names_of(holding ^ still):
                            found[name] = begin + start
                    holding = still
                    if not holding:
                        return found
        if len(keys):
            found.update(dict.fromkeys(self._names_of(holding), len(keys)))
        return found

    @property
    def replicas(self) -> list[str]:
        """Those that have stored something and were not removed."""
        return list(self._bits)

    def memory_bytes(self) -> int:
        """What the index takes, without the interpreter's small change."""
        arrays = self._keys.nbytes + self._ids.nbytes + self._void.nbytes + self._used.nbytes
        masks = sum(map(sys.getsizeof, self._masks)) + sys.getsizeof(self._masks) + sys.getsizeof(self._id_of)
        overflow = sys.getsizeof(self._overflow) + 32 * len(self._overflow)
        return arrays + masks + overflow

    # --- events ---------------------------------------------------------------------------------------------------

    def snapshot(self, replica: str, hashes: Hashes) -> None:
        """The replica holds exactly these blocks."""
        self.remove(replica)
        self.stored(replica, hashes)

    def stored(self, replica: str, hashes: Hashes) -> None:
        """The replica holds these blocks as well; any that it had already may be among them."""
        bit = self._bits.get(replica) or self._new_bit(replica)
        keys = _keys_of(hashes)
        for start in range(0, len(keys), _PART):
            self._store(keys[start : start + _PART], bit)
        self.sweep()

    def evicted(self, replica: str, hashes: Hashes) -> None:
        """The replica does not hold these blocks any more; any that it never had may be among them."""
        if bit := self._bits.get(replica):
            keys = _keys_of(hashes)
            for start in range(0, len(keys), _PART):
                self._evict(keys[start : start + _PART], bit)
        self.sweep()

    def remove(self, replica: str) -> None:
        """Forget a replica, if it is known."""
        bit = self._bits.pop(replica, 0)
        self._alive &= ~bit
        self._dead |= bit

    def sweep(self) -> bool:
        """Do a small part of the cleaning, if there is something to clean; whether more is left. Every update does."""
        if self._cleaning is None:
            if not self._dead and self._num_masks() < self._clean_at:
                return False
            self._cleaning = self._clean()
        if next(self._cleaning, self) is self:
            self._cleaning = None
        return self._cleaning is not None or self._dead != 0

    # --- the table ------------------------------------------------------------------------------------------------

    def _find(self, keys: _Array) -> tuple[_Array, _Array]:
        """Which of the keys are in a bucket (positions, in order), and in which slots."""
        buckets = keys & self._bucket_mask
        difference = self._keys.take(buckets, 0)
        difference -= keys[:, None]
        hits = np.flatnonzero(difference == 0)
        at = hits >> _WIDTH_BITS
        return at, (buckets[at] << _WIDTH_BITS) + (hits & (_WIDTH - 1))

    def _leading_ids(self, keys: _Array) -> NDArray[np.uint32]:
        """Ids of the keys up to the first one that is not here, which gets the id 0."""
        at, slots = self._find(keys)
        if len(at) == len(keys):
            return self._ids[slots]
        ids = np.zeros(len(keys), np.uint32)
        ids[at] = self._ids[slots]
        for missing in np.flatnonzero(ids == 0).tolist():
            if not (mask_id := self._overflow.get(int(keys[missing]), 0)):
                return ids[: missing + 1]
            ids[missing] = mask_id
        return ids

    def _store(self, keys: _Array, bit: int) -> None:
        at, slots = self._find(keys)
        if len(at):
            self._ids[slots] = self._changed(self._ids[slots].tolist(), lambda mask: mask | bit, keep=True)
        if len(at) < len(keys):
            missing = np.ones(len(keys), np.bool_)
            missing[at] = False
            self._insert(self._store_overflow(keys[missing], bit), bit)

    def _store_overflow(self, keys: _Array, bit: int) -> _Array:
        """Handle the keys that lie outside of the buckets; the others, each once."""
        if self._overflow and (outside := [key for key in keys.tolist() if key in self._overflow]):
            ids = [self._overflow[key] for key in outside]
            self._overflow.update(zip(outside, self._changed(ids, lambda mask: mask | bit, keep=True), strict=True))
            keys = keys[~np.isin(keys, outside)]
        return keys if len(set(keys.tolist())) == len(keys) else np.unique(keys)

    def _insert(self, keys: _Array, bit: int) -> None:
        """Take in blocks that are not here."""
        slices = _MORE_SLICES
        while len(keys) > self.max_blocks - self.num_blocks and slices and self.sweep():
            slices -= 1
        room = self.max_blocks - self.num_blocks
        self.dropped += max(0, len(keys) - room)
        keys = keys[:room]
        self.num_blocks += len(keys)
        mask_id = self._id(bit)
        while len(keys):
            buckets = keys & self._bucket_mask
            slots = (buckets << _WIDTH_BITS) + (self._keys.take(buckets, 0) == 0).argmax(1)
            full = self._flat_keys[slots] != 0
            if full.any():
                self._overflow.update(dict.fromkeys(keys[full].tolist(), mask_id))
                keys, slots = keys[~full], slots[~full]
            self._flat_keys[slots] = keys
            self._ids[slots] = mask_id
            keys = keys[self._flat_keys[slots] != keys]  # another key of the same bucket took the slot

    def _evict(self, keys: _Array, bit: int) -> None:
        at, slots = self._find(keys)
        if len(at):
            self._ids[slots] = self._changed(self._ids[slots].tolist(), lambda mask: mask & ~bit, keep=False)
            self._free_slots(slots[self._ids[slots] == 0])
        if self._overflow and len(at) < len(keys):
            outside = [key for key in keys.tolist() if key in self._overflow]
            ids = [self._overflow[key] for key in outside]
            changed = self._changed(ids, lambda mask: mask & ~bit, keep=False)
            self._update_overflow(dict(zip(outside, changed, strict=True)))

    def _free_slots(self, slots: _Array) -> None:
        if len(slots):
            self._flat_keys[slots] = 0
            self._ids[slots] = 0
            self.num_blocks -= len(set(slots.tolist()))  # numpy's `unique` takes longer for a few

    def _update_overflow(self, changed: dict[int, int]) -> None:
        for key, mask_id in changed.items():
            if mask_id:
                self._overflow[key] = mask_id
            else:
                del self._overflow[key]
                self.num_blocks -= 1

    # --- sets of replicas -----------------------------------------------------------------------------------------

    def _changed(self, ids: list[int], change: Callable[[int], int], keep: bool) -> list[int]:
        """The ids of the changed sets. Where there are too many sets, the block keeps its id or is forgotten (0)."""
        changed: dict[int, int] = {}
        refused: set[int] = set()
        for mask_id in set(ids):
            mask = change(self._masks[mask_id]) & self._alive
            if mask & (mask - 1) and mask not in self._id_of and self._num_masks() >= self._max_masks:
                refused.add(mask_id)
                changed[mask_id] = mask_id if keep else 0
                self._used[mask_id] = True
            else:
                changed[mask_id] = self._id(mask)
        if refused:
            self.dropped += sum(mask_id in refused for mask_id in ids)
        return [changed[mask_id] for mask_id in ids]

    def _id(self, mask: int) -> int:
        """The number of a set of replicas; 0 is that of the empty set."""
        if not mask:
            return 0
        mask_id = self._id_of.get(mask)
        if mask_id is None:
            if self._free_ids:
                mask_id = self._free_ids.pop()
                self._masks[mask_id] = mask
            else:
                mask_id = len(self._masks)
                self._masks.append(mask)
                if mask_id == len(self._used):
                    self._used = np.concatenate([self._used, np.zeros_like(self._used)])
                    self._void = np.concatenate([self._void, np.zeros_like(self._void)])
            self._id_of[mask] = mask_id
        self._used[mask_id] = True
        return mask_id

    def _num_masks(self) -> int:
        return len(self._masks) - len(self._free_ids)

    def _names_of(self, mask: int) -> tuple[str, ...]:
        """The replicas in a set."""
        names = self._names.get(mask)
        if names is None:
            found = []
            rest = mask
            while rest:
                low = rest & -rest
                found.append(self._replica_of[low.bit_length() - 1])
                rest ^= low
            if len(self._names) >= _REMEMBERED_NAMES:
                self._names.clear()
            names = self._names[mask] = tuple(name for name in found if name is not None)
        return names

    def _new_bit(self, replica: str) -> int:
        if None in self._replica_of:
            number = self._replica_of.index(None)
            self._replica_of[number] = replica
        else:
            number = len(self._replica_of)
            self._replica_of.append(replica)
        bit = self._bits[replica] = 1 << number
        self._alive |= bit
        return bit

    # --- cleaning -------------------------------------------------------------------------------------------------

    def _clean(self) -> Iterator[None]:
        """Take dead bits out of the sets, remove the blocks that nobody holds any more, and forget unused sets."""
        dead, self._dead = self._dead, 0
        if dead:
            yield from self._clean_masks(dead)
        self._used[:] = False
        slots = len(self._ids)
        for start in range(0, slots, _SLICE_SLOTS):
            ids = self._ids[start : start + _SLICE_SLOTS]
            self._used[ids] = True
            if dead:
                self._free_slots(np.flatnonzero(self._void[ids]) + start)
            yield
        keys = list(self._overflow)
        for start in range(0, len(keys), _SLICE_MASKS):
            for key in keys[start : start + _SLICE_MASKS]:
                if mask_id := self._overflow.get(key):
                    self._used[mask_id] = True
                    if self._void[mask_id]:
                        self._update_overflow({key: 0})
            yield
        yield from self._forget_unused_masks()

    def _clean_masks(self, dead: int) -> Iterator[None]:
        """After this no set has a bit of `dead`; sets that are made from now on never get one."""
        for start in range(1, len(self._masks), _SLICE_MASKS):
            for mask_id in range(start, min(start + _SLICE_MASKS, len(self._masks))):
                mask = self._masks[mask_id]
                if mask & dead:
                    if self._id_of.get(mask) == mask_id:
                        del self._id_of[mask]
                    self._masks[mask_id] = mask = mask & ~dead
                    if mask:
                        self._id_of.setdefault(mask, mask_id)
                    else:
                        self._void[mask_id] = True
            yield
        while dead:
            low = dead & -dead
            self._replica_of[low.bit_length() - 1] = None
            dead ^= low
        self._names.clear()

    def _forget_unused_masks(self) -> Iterator[None]:
        end = len(self._masks)
        free = set(self._free_ids)
        unused = np.flatnonzero(~self._used[1:end] | self._void[1:end]) + 1
        for start in range(0, len(unused), _SLICE_MASKS):
            for mask_id in unused[start : start + _SLICE_MASKS].tolist():
                if mask_id in free or (self._used[mask_id] and not self._void[mask_id]):
                    continue  # free already, or taken since
                mask = self._masks[mask_id]
                if self._id_of.get(mask) == mask_id:
                    del self._id_of[mask]
                self._masks[mask_id] = 0
                self._void[mask_id] = False
                self._free_ids.append(mask_id)
            yield
        self._clean_at = min(max(1024, 2 * self._num_masks()), self._max_masks)

    # --- inspection -----------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError unless table, sets and counts agree."""
        taken = np.flatnonzero(self._flat_keys)
        keys = self._flat_keys[taken]
        assert np.array_equal(taken, np.flatnonzero(self._ids)), "a slot has a key without replicas, or the reverse"
        assert np.array_equal(keys & self._bucket_mask, taken >> _WIDTH_BITS), "a block lies in a wrong bucket"
        assert len(set(keys.tolist())) == len(keys), "a block is in the table twice"
        assert self._overflow.keys().isdisjoint(keys.tolist()), "a block is inside and outside of the buckets"
        assert self.num_blocks == len(keys) + len(self._overflow) <= self.max_blocks, "blocks are miscounted"
        named = set(self._ids[taken].tolist()) | set(self._overflow.values())
        assert named.isdisjoint(self._free_ids), "a set of replicas that blocks refer to is free"
        assert len(set(self._free_ids)) == len(self._free_ids), "a set of replicas is free twice"
        known = 0
        for mask_id in range(1, len(self._masks)):
            mask = self._masks[mask_id]
            known |= mask
            if mask_id not in self._free_ids:
                assert bool(mask) != bool(self._void[mask_id]), f"set {mask_id} is empty and not to be removed"
        for mask, mask_id in self._id_of.items():
            assert self._masks[mask_id] == mask, f"set {mask_id} is found by a wrong mask"
        given = sum(1 << number for number, name in enumerate(self._replica_of) if name is not None)
        assert not known & ~given, "a set has a bit that is nobody's"
        assert self._alive == sum(self._bits.values()), "a replica is neither alive nor dead"
        assert not self._alive & self._dead, "a replica is alive and dead"
        for replica, bit in self._bits.items():
            assert self._replica_of[bit.bit_length() - 1] == replica, f"the bit of {replica} has another name"


def _keys_of(hashes: Hashes) -> _Array:
    """As the table has them."""
    if not isinstance(hashes, np.ndarray):
        hashes = np.frombuffer(array("q", hashes), np.int64)
    return hashes + 1
