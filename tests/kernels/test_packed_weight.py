"""Packing keeps every number, in the order that the products read."""

import pytest
import torch

from raytroupe.kernels.packed_weight import BLOCKS, GROUP, LANES, interleave_gate, pack

SHAPES = [(1, 1), (15, 2), (16, 31), (17, 1), (63, 8), (64, 3), (65, 40), (128, 1), (131, 31), (200, 17)]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def numbered(rows, inputs, dtype):
    """Numbers that bfloat16 tells apart, as bit patterns; none is zero or NaN."""
    count = torch.arange(1, rows * inputs + 1).view(rows, inputs)
    return count.short().view(dtype) if dtype == torch.bfloat16 else count.to(dtype)


@dtypes
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_a_group_is_one_stream_of_blocks_and_the_rest_is_zeros(rows, inputs, dtype):
    """The place of every number, as `kernels/native/linear.h` draws it."""
    weight = numbered(rows, inputs, dtype)
    packed = pack(weight)
    assert packed.shape == (rows, inputs)
    together = 2 if dtype == torch.bfloat16 else 1
    steps, padded_rows = -(-inputs // together), -(-rows // GROUP) * GROUP
    assert packed.data.shape == (padded_rows * steps * together,)
    expected = torch.zeros_like(packed.data)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(inputs), indexing="ij")
    group, block, lane, step = row // GROUP, row % GROUP // LANES, row % LANES, column // together
    place = group * GROUP * steps + (step * BLOCKS + block) * LANES + lane
    place = place * together + column % together
    expected[place.flatten()] = weight.flatten()
    assert torch.equal(packed.data, expected)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 32, 33, 48, 64, 100])
@pytest.mark.parametrize("shape", [(5,), ()], ids=["weight", "bias"])
def test_every_group_has_both_halves_of_the_gate(width, shape):
    gate = torch.arange(1.0, width + 1).view(width, *[1] * len(shape)).expand(width, *shape)
    mixed = interleave_gate(torch.cat((gate, -gate)))
    padded = -(-width // (GROUP // 2)) * (GROUP // 2)
    assert mixed.shape == (2 * padded, *shape)
    first = mixed.reshape(2 * padded, -1)[:, 0]
    for group in first.split(GROUP):
        ours, theirs = group.chunk(2)
        assert torch.equal(ours, -theirs)
    gates = torch.cat([group.chunk(2)[0] for group in first.split(GROUP)])
    assert torch.equal(gates[:width], torch.arange(1.0, width + 1))
    assert not gates[width:].any()


@pytest.mark.parametrize("compress", [False, True])
def test_parts_of_a_weight_make_the_same_stream_as_all_of_it(compress, generator, monkeypatch):
    weight = (torch.randn(7 * GROUP + 5, 31, generator=generator) * 0.02).bfloat16()
    whole = pack(weight, compress=compress)
    monkeypatch.setattr("raytroupe.kernels.packed_weight.PART_BYTES", 2 * GROUP * 32 * 2)
    parts = pack(weight, compress=compress)
    assert whole.compressed == parts.compressed == compress
    assert torch.equal(whole.data.view(torch.uint8), parts.data.view(torch.uint8))
