"""A block's hash stands for its tokens, all tokens before it, and the salt; ingress and scheduler compute the same."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from raytroupe.actors.load_reporter import pack_hashes
from raytroupe.cluster.block_hash import (
    DIGEST_BYTES,
    SHORT_BITS,
    extend_block_hashes,
    short_block_hashes,
    short_hash,
)

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
SIZES = st.integers(1, 8)
SALTS = st.text(max_size=5)


def hashes(tokens: list[int], size: int = 4, salt: str = "") -> list[bytes]:
    found: list[bytes] = []
    extend_block_hashes(found, tokens, size, salt)
    return found


@given(TOKENS, SIZES, SALTS)
def test_only_full_blocks_have_a_hash(tokens, size, salt) -> None:
    found = hashes(tokens, size, salt)
    assert len(found) == len(tokens) // size
    assert all(len(digest) == DIGEST_BYTES for digest in found)


@given(TOKENS, TOKENS, SIZES, SALTS)
def test_hashes_go_on_where_they_stopped(tokens, more, size, salt) -> None:
    found = hashes(tokens, size, salt)
    extend_block_hashes(found, tokens + more, size, salt)
    assert found == hashes(tokens + more, size, salt)


@given(TOKENS, TOKENS, SIZES, SALTS)
def test_hashes_are_equal_as_far_as_the_tokens_are(left, right, size, salt) -> None:
    ours, theirs = hashes(left, size, salt), hashes(right, size, salt)
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=False), 1):
        assert (mine == other) == (left[: number * size] == right[: number * size])


def test_the_same_tokens_after_others_are_another_block() -> None:
    first, second = hashes([1, 2, 1, 2], 2)
    assert first != second
    assert hashes([9, 9, 1, 2], 2)[1] != second


@pytest.mark.parametrize("salt", ["a", "\0", " "])
def test_another_salt_shares_nothing(salt) -> None:
    tokens = list(range(40))
    assert not set(hashes(tokens)) & set(hashes(tokens, salt=salt))
    assert hashes(tokens, salt=salt) == hashes(tokens, salt=salt)


def test_a_block_size_of_its_own_shares_nothing() -> None:
    assert not set(hashes([7] * 64, 4)) & set(hashes([7] * 64, 8))


@given(TOKENS, SIZES, SALTS)
def test_short_hashes_are_what_replicas_report(tokens, size, salt) -> None:
    short = short_block_hashes(tokens, size, salt)
    digests = hashes(tokens, size, salt)
    assert short == [short_hash(digest) for digest in digests]
    packed = pack_hashes(digests)
    assert short == [int.from_bytes(packed[start : start + 8], "little") for start in range(0, len(packed), 8)]
    assert all(0 <= number < 1 << SHORT_BITS for number in short)


def test_a_hash_is_the_same_in_every_process() -> None:
    assert short_block_hashes([1, 2, 3, 4], 2, "salt") == [708958290179030230, 312364417975710741]
