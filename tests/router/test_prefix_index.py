"""The index of prefixes against a plain model of it, and its bounds."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from raytroupe.router import prefix_index
from raytroupe.router.prefix_index import PrefixIndex

REPLICAS = [f"replica-{number}" for number in range(5)]
HASHES = st.lists(st.integers(0, 40).map(lambda number: number * 8), max_size=12)
"""Many of them share a bucket."""


def leading(held: dict[str, set[int]], prompt: list[int]) -> dict[str, int]:
    """What `overlaps` means."""
    counts = {}
    for replica, blocks in held.items():
        count = next((index for index, block in enumerate(prompt) if block not in blocks), len(prompt))
        if count:
            counts[replica] = count
    return counts


def cleaned(index: PrefixIndex) -> PrefixIndex:
    """After all cleaning is done."""
    while index.sweep():
        pass
    index.check_integrity()
    return index


class PrefixIndexMachine(RuleBasedStateMachine):
    """Replicas store, lose, begin anew and leave; the model is a set of blocks for each."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(1000)
        self.held: dict[str, set[int]] = {}

    @rule(replica=st.sampled_from(REPLICAS), hashes=HASHES)
    def snapshot(self, replica, hashes):
        self.index.snapshot(replica, hashes)
        self.held[replica] = set(hashes)

    @rule(replica=st.sampled_from(REPLICAS), hashes=HASHES)
    def stored(self, replica, hashes):
        self.index.stored(replica, np.array(hashes, np.int64))
        self.held.setdefault(replica, set()).update(hashes)

    @rule(replica=st.sampled_from(REPLICAS), hashes=HASHES)
    def evicted(self, replica, hashes):
        self.index.evicted(replica, hashes)
        self.held.get(replica, set()).difference_update(hashes)

    @rule(replica=st.sampled_from(REPLICAS))
    def remove(self, replica):
        self.index.remove(replica)
        self.held.pop(replica, None)

    @rule(times=st.integers(1, 5))
    def sweep(self, times):
        for _ in range(times):
            self.index.sweep()

    @rule(prompt=HASHES)
    def overlaps_are_those_of_the_model(self, prompt):
        assert self.index.overlaps(prompt) == leading(self.held, prompt)

    @invariant()
    def books_agree(self):
        self.index.check_integrity()
        assert self.index.replicas == list(self.held) or set(self.index.replicas) == set(self.held)

    def teardown(self):
        cleaned(self.index)
        assert self.index.num_blocks == len(set().union(*self.held.values()))
        assert self.index.overlaps(sorted(set().union(*self.held.values()))) == leading(
            self.held, sorted(set().union(*self.held.values()))
        )


TestPrefixIndex = PrefixIndexMachine.TestCase


class SmallSlicesMachine(PrefixIndexMachine):
    """The same with cleaning that is always under way."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(prefix_index, "_SLICE_SLOTS", 64)
        self.patch.setattr(prefix_index, "_SLICE_MASKS", 2)
        self.patch.setattr(prefix_index, "_LOOK_AHEAD", 3)
        self.patch.setattr(prefix_index, "_PART", 4)
        self.index = PrefixIndex(1000)
        self.index._clean_at = 0

    def teardown(self):
        self.patch.undo()
        self.index._clean_at = 1024
        super().teardown()


TestSmallSlices = SmallSlicesMachine.TestCase


def test_a_random_history_of_many_blocks_agrees_with_the_model() -> None:
    rng = random.Random(1)
    index = PrefixIndex(5000)
    held: dict[str, set[int]] = {}
    chains = [[rng.getrandbits(60) for _ in range(40)] for _ in range(100)]
    for turn in range(4000):
        replica = f"replica-{rng.randrange(70)}"
        chain = rng.choice(chains)
        part = chain[: rng.randrange(41)]
        kind = rng.random()
        if kind < 0.6:
            index.stored(replica, part)
            held.setdefault(replica, set()).update(part)
        elif kind < 0.9:
            index.evicted(replica, part[-5:])
            held.get(replica, set()).difference_update(part[-5:])
        elif kind < 0.96:
            index.snapshot(replica, part)
            held[replica] = set(part)
        else:
            index.remove(replica)
            held.pop(replica, None)
        if turn % 20 == 0:
            prompt = rng.choice(chains)
            assert index.overlaps(prompt) == leading(held, prompt)
            assert index.overlaps([*prompt, 5]) == leading(held, prompt)
        if turn % 500 == 0:
            index.check_integrity()
    assert index.dropped == 0
    assert cleaned(index).num_blocks == len(set().union(*held.values()))


def test_blocks_that_find_their_bucket_full_are_kept_outside() -> None:
    index = PrefixIndex(1000)
    step = index._bucket_mask + 1
    same_bucket = [number * step for number in range(30)]
    index.stored("a", same_bucket)
    index.stored("b", same_bucket[:20])
    index.check_integrity()
    assert index.num_blocks == 30
    assert index.overlaps(same_bucket) == {"a": 30, "b": 20}
    index.evicted("a", same_bucket[10:])
    index.evicted("b", same_bucket[15:])
    index.check_integrity()
    assert index.num_blocks == 15
    assert index.overlaps(same_bucket) == {"a": 10, "b": 15}
    index.remove("b")
    assert cleaned(index).num_blocks == 10


def test_what_does_not_fit_is_dropped_and_counted() -> None:
    index = PrefixIndex(100)
    index.stored("a", range(80))
    index.stored("b", range(70, 130))
    index.check_integrity()
    assert index.num_blocks == 100
    assert index.dropped == 30
    assert index.overlaps(range(70, 130)) == {"a": 10, "b": 30}, "the beginning of a prompt is worth more than its end"
    index.evicted("a", range(50))
    index.stored("b", range(100, 130))
    assert index.overlaps(range(70, 130))["b"] == 60


def test_a_full_index_takes_in_a_replica_whose_predecessor_has_left() -> None:
    index = PrefixIndex(20_000)
    index.stored("old", range(20_000))
    index.remove("old")
    assert index.overlaps(range(10)) == {}
    index.stored("new", range(100_000, 120_000))
    assert index.overlaps(range(100_000, 120_000)) == {"new": 20_000}
    assert index.dropped == 0


def test_a_snapshot_that_repeats_what_is_known_needs_no_more_room() -> None:
    index = PrefixIndex(100)
    index.stored("a", range(100))
    for _ in range(50):
        index.snapshot("a", range(100))
        index.check_integrity()
        assert index.overlaps(range(100)) == {"a": 100}
    assert index.dropped == 0
    assert index.num_blocks == 100


def test_bits_are_used_again_after_cleaning_only() -> None:
    index = PrefixIndex(1000)
    index.stored("a", range(500))
    index.stored("b", range(100))
    index.remove("a")
    index._new_bit("c")
    assert index.overlaps(range(500)) == {"b": 100}, "c does not inherit what a held"
    cleaned(index)
    index.stored("d", range(3))
    assert len(index._replica_of) == 3, "d has the bit that a had"
    assert index.overlaps(range(500)) == {"b": 100, "d": 3}


def test_snapshots_without_end_take_no_memory() -> None:
    index = PrefixIndex(2000)
    rng = random.Random(3)
    for _ in range(2000):
        blocks = rng.sample(range(3000), 60)
        index.snapshot(f"replica-{rng.randrange(20)}", blocks)
    assert len(index._replica_of) < 100
    cleaned(index)
    assert len(index._replica_of) < 100
    assert index._num_masks() <= index._max_masks


def test_sets_of_replicas_are_bounded() -> None:
    index = PrefixIndex(10_000)
    rng = random.Random(2)
    for _ in range(300):
        index.stored(f"replica-{rng.randrange(40)}", rng.sample(range(10_000), 2000))
    cleaned(index)
    assert index._num_masks() <= index._max_masks + len(index.replicas)
    assert index.dropped > 0
    for _ in range(300):
        index.evicted(f"replica-{rng.randrange(40)}", rng.sample(range(10_000), 2000))
    cleaned(index)


def test_unused_sets_are_forgotten() -> None:
    index = PrefixIndex(4000)
    rng = random.Random(2)
    for _ in range(400):
        replica = f"replica-{rng.randrange(40)}"
        index.stored(replica, rng.sample(range(400), 100))
        index.evicted(replica, rng.sample(range(400), 200))
    for replica in list(index.replicas):
        index.evicted(replica, range(400))
    index._clean_at = 0
    index.sweep()
    cleaned(index)
    while index.sweep():
        pass
    assert index.num_blocks == 0


def test_a_thousand_replicas() -> None:
    index = PrefixIndex(100_000)
    for number in range(1000):
        index.stored(f"replica-{number}", range(number % 50 + 1))
    found = index.overlaps(range(60))
    assert len(found) == 1000
    assert found["replica-149"] == 50
    for number in range(0, 1000, 2):
        index.remove(f"replica-{number}")
    assert len(index.overlaps(range(60))) == 500
    assert len(cleaned(index).overlaps(range(60))) == 500


def test_a_prompt_that_nobody_has_seen_and_an_empty_one() -> None:
    index = PrefixIndex(100)
    assert index.overlaps([1, 2]) == {}
    index.stored("a", [1])
    assert index.overlaps([]) == {}
    assert index.overlaps([2, 1]) == {}
    assert index.overlaps([0]) == {}
    index.stored("a", [0, (1 << 60) - 1])
    assert index.overlaps([0, (1 << 60) - 1, 1, 3]) == {"a": 3}


def test_an_index_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block, got 0"):
        PrefixIndex(0)
