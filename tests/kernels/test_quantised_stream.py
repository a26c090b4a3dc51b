"""Every number of a quantised weight is where the compiled product reads it."""

import pytest
import torch
from quantised_weights import random_quantised

from raytroupe.kernels.quantised_stream import QuantisedStream, can_stream, make_stream


def read_back(stream: QuantisedStream) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Integers [out, padded inputs], scales and zeros [out, groups], read byte by byte."""
    step_inputs = 8 if stream.bits == 4 else 4
    steps = stream.group_size // step_inputs
    scale_dtype = (torch.float32, torch.bfloat16, torch.float16)[stream.scale_kind]
    sizes = [steps * 256, 64 * scale_dtype.itemsize, 64 if stream.has_zeros else 0]
    groups = stream.data.view(-1, stream.groups, sum(sizes))
    values, scales, zeros = groups.split(sizes, -1)
    pieces = len(groups)
    integers = torch.zeros(pieces, 64, stream.groups, stream.group_size, dtype=torch.uint8)
    steps_of = values.reshape(pieces, stream.groups, steps, 64, 4)
    for column in range(64):
        for byte in range(4):
            of_column = steps_of[:, :, :, column, byte]
            if stream.bits == 4:
                integers[:, column, :, byte::8] = of_column & 15
                integers[:, column, :, byte + 4 :: 8] = of_column >> 4
            else:
                integers[:, column, :, byte::4] = of_column
    of_scales = scales.contiguous().view(scale_dtype).transpose(1, 2).flatten(0, 1)
    of_zeros = zeros.transpose(1, 2).flatten(0, 1) if stream.has_zeros else None
    return integers.flatten(0, 1).flatten(1), of_scales, of_zeros


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group_size"), [(70, 64, 32), (64, 300, 0), (3, 416, 128), (65, 512, 256)]
)
def test_integers_scales_and_zeros_lie_as_drawn(outputs, inputs, group_size, bits, zeros, scales, generator):
    weight = random_quantised(outputs, inputs, generator, bits=bits, group_size=group_size, zeros=zeros, scales=scales)
    stream = make_stream(weight)
    integers, of_scales, of_zeros = read_back(stream)
    assert torch.equal(integers[:outputs, :inputs], weight.integers())
    spread = of_scales.repeat_interleave(stream.group_size, 1)[:outputs, :inputs]
    assert torch.equal(spread, weight.per_input(weight.scales))
    assert not of_scales[outputs:].any()
    if zeros:
        spread = of_zeros.repeat_interleave(stream.group_size, 1)[:outputs, :inputs]
        assert torch.equal(spread, weight.per_input(weight.zeros))


def test_gate_and_up_alternate_by_half_a_piece(generator):
    weight = random_quantised(140, 64, generator, group_size=32, zeros=True)
    integers, scales, zeros = read_back(make_stream(weight, gated=True))
    for row in range(70):
        place = row // 32 * 64 + row % 32
        for half, at in ((row, place), (row + 70, place + 32)):
            assert torch.equal(integers[at], weight.integers()[half])
            assert torch.equal(scales[at], weight.scales[half])
            assert torch.equal(zeros[at], weight.zeros[half])


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_4_bits_in_groups_of_128_take_little_more_than_a_quarter_of_16(zeros, generator):
    stream = make_stream(random_quantised(256, 1024, generator, group_size=128, zeros=zeros))
    assert stream.data.nbytes <= 0.27 * 256 * 1024 * 2


def test_a_large_weight_is_packed_part_by_part(monkeypatch, generator):
    weight = random_quantised(300, 64, generator, group_size=32)
    whole = make_stream(weight).data
    monkeypatch.setattr("raytroupe.kernels.quantised_stream.PART_BYTES", 1)
    assert torch.equal(make_stream(weight).data, whole)


def test_the_order_is_that_of_x_and_what_is_added_meets_nothing(generator):
    weight = random_quantised(8, 300, generator, ordered=True)
    stream = make_stream(weight)
    assert torch.equal(stream.order[:300].long(), weight.order)
    assert (stream.order[300:] == -1).all()
    assert len(stream.order) == stream.padded_inputs


def test_groups_that_are_no_whole_steps_are_refused(generator):
    assert not can_stream(random_quantised(8, 60, generator, group_size=12))
    assert can_stream(random_quantised(8, 60, generator))
