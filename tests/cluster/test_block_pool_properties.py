"""The block pool driven through random histories against a plain model of it."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytroupe.cluster.block_pool import BlockPool


class BlockPoolMachine(RuleBasedStateMachine):
    """Sequences take, share, name and release blocks; the model knows what each hash must lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.pool.record_events(True)
        self.mirror: set[bytes] = set()
        self.tables: list[list[int]] = []
        self.named: dict[int, bytes] = {}

    @rule(count=st.integers(0, 14))
    def allocate(self, count):
        free = self.pool.num_unheld
        held = {block for table in self.tables for block in table}
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert len(set(blocks)) == count
            assert not held & set(blocks)
            for block in blocks:
                self.named.pop(block, None)
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), content=st.binary(min_size=1, max_size=1))
    def register(self, data, content):
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        block = data.draw(st.sampled_from(table))
        self.pool.register(block, content)
        if block not in self.named and content not in self.named.values():
            self.named[block] = content

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def share(self, data):
        block, content = data.draw(st.sampled_from(sorted(self.named.items())))
        assert self.pool.find(content) == block
        self.pool.share(block)
        self.tables.append([block])

    @rule(content=st.binary(min_size=2, max_size=2))
    def unknown_content_is_not_found(self, content):
        assert self.pool.find(content) is None

    @rule()
    def a_mirror_of_the_drained_events_knows_what_can_be_found(self):
        stored, evicted = self.pool.drain_events()
        assert self.mirror.isdisjoint(stored)
        assert self.mirror.issuperset(evicted)
        self.mirror = (self.mirror | set(stored)) - set(evicted)
        assert self.mirror == set(self.pool.cached_contents()) == set(self.named.values())

    @rule()
    def a_new_listener_begins_with_what_is_cached(self):
        self.pool.record_events(True)
        self.mirror = set(self.pool.cached_contents())

    @invariant()
    def books_agree(self):
        self.pool.check_integrity()
        held = {block for table in self.tables for block in table}
        assert self.pool.num_held == len(held)
        for block in range(1, 12):
            assert self.pool.references(block) == sum(table.count(block) for table in self.tables)


TestBlockPool = BlockPoolMachine.TestCase


def test_blocks_without_content_are_reused_before_cached_ones_and_those_least_recently_used_first():
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    for block in blocks[:3]:
        pool.register(block, bytes([block]))
    pool.release([blocks[0]])
    pool.release([blocks[1], blocks[2]])
    pool.release([blocks[3]])
    assert pool.allocate(4) == [blocks[3], blocks[0], blocks[2], blocks[1]]


def test_events_are_recorded_only_while_somebody_listens():
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"before")
    assert pool.drain_events() == ([], [])
    pool.record_events(True)
    pool.register(blocks[1], b"now")
    assert pool.drain_events() == ([b"now"], [])
    pool.release(blocks)
    pool.allocate(2)
    pool.record_events(False)
    assert pool.drain_events() == ([], [])


def test_what_comes_and_goes_between_two_drains_is_no_event():
    pool = BlockPool(2)
    pool.record_events(True)
    for content in (b"a", b"b", b"a", b"c"):
        (block,) = pool.allocate(1)
        pool.register(block, content)
        pool.release([block])
    assert pool.drain_events() == ([b"c"], [])
    for content in (b"a", b"c"):
        (block,) = pool.allocate(1)
        pool.register(block, content)
        pool.release([block])
    assert pool.drain_events() == ([], []), "c went and came back"


def test_the_check_notices_broken_books():
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool._references[block] = 0
    with pytest.raises(AssertionError, match=f"block {block}"):
        pool.check_integrity()
