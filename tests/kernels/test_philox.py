"""Philox against the published known answers and against the algorithm written out in plain integers."""

import numpy as np
import pytest

from raytroupe.kernels.philox import philox4x32, uniforms


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, one block, Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


# The known answers of the authors' Random123 library (kat_vectors: philox4x32 10).
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    column = lambda words: np.array(words, dtype=np.uint64)[:, None]  # noqa: E731
    assert philox4x32(column(counter), column(key))[:, 0].tolist() == answer
    assert plain_philox(counter, key) == answer


def test_blocks_are_independent_and_match_plain_integers():
    words = np.random.default_rng(0).integers(0, 2**32, (6, 100), dtype=np.uint64)
    result = philox4x32(words[:4], words[4:])
    for i in range(100):
        assert result[:, i].tolist() == plain_philox(words[:4, i].tolist(), words[4:, i].tolist())


def test_uniforms_use_all_bits_of_seed_and_position():
    seeds = np.array([0, 1, 2**32, 2**63, 2**64 - 1, 0, 0, 0], dtype=np.uint64)
    positions = np.array([0, 0, 0, 0, 0, 1, 2**31, 2**32], dtype=np.int64)
    values = uniforms(seeds, positions)
    for seed, position, value in zip(seeds.tolist(), positions.tolist(), values.tolist(), strict=True):
        words = plain_philox([position % 2**32, position >> 32, 0, 0], [seed % 2**32, seed >> 32])
        assert value == ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53
    assert len(set(values.tolist())) == len(values)


def test_uniforms_are_uniform():
    values = uniforms(np.repeat(np.arange(100, dtype=np.uint64), 1000), np.tile(np.arange(1000), 100))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts, _ = np.histogram(values, bins=100, range=(0, 1))
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 150  # 99 degrees of freedom: p = 7e-4 beyond 149.4; the inputs are fixed
