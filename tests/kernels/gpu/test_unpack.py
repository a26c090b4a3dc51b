"""The few machine instructions that unpack weights, which Triton's interpreter does not run, on every byte."""

import re

import pytest
import torch

from raytroupe.kernels.gpu import unpack

BITS_32 = 0xFFFFFFFF


def run(program, word):
    """What the inline assembly leaves in its result registers for an input register, by PTX's definitions."""
    statements = re.findall(r"(\w+\.\w+) ([^;]*);", program)
    inputs = max(int(number) for number in re.findall(r"\$(\d)", program))
    registers = {f"${inputs}": word}

    def value(name):
        return registers[name] if name in registers else int(name, 0)

    for operation, operands in statements:
        target, *sources = operands.split(", ")
        values = [value(source) for source in sources]
        match operation:
            case "and.b32":
                result = values[0] & values[1]
            case "or.b32":
                result = values[0] | values[1]
            case "shr.u32":
                result = values[0] >> values[1]
            case "prmt.b32":
                both = (values[1] << 32 | values[0]).to_bytes(8, "little")
                selected = (values[2] >> (4 * place) & 15 for place in range(4))
                result = int.from_bytes(bytes(both[place] for place in selected), "little")
            case _:
                raise AssertionError(operation)
        registers[target] = result & BITS_32
    return [registers[f"${index}"] for index in range(inputs)]


def unpacked(program, values, dtype):
    """Results of all of `values` [n, 4] bytes: [n, registers, 2]."""
    words = [int.from_bytes(bytes(row), "little") for row in values.tolist()]
    results = torch.tensor([run(program, word) for word in words])
    halves = torch.stack((results & 0xFFFF, results >> 16), -1).to(torch.uint16)
    return halves.view(dtype).float()


ALL_BYTES = torch.stack([torch.arange(256).roll(shift) for shift in (0, 1, 77, 200)], -1)


@pytest.mark.parametrize(
    ("program", "dtype", "base"), [("_BFLOAT16", torch.bfloat16, 128.0), ("_FLOAT16", torch.float16, 1024.0)]
)
def test_nibbles_lie_above_a_power_of_two_in_the_order_of_their_bytes(program, dtype, base):
    got = unpacked(getattr(unpack, program).value, ALL_BYTES, dtype)
    assert torch.equal(got[:, :2].flatten(1), base + (ALL_BYTES & 15))
    assert torch.equal(got[:, 2:].flatten(1), base + (ALL_BYTES >> 4))


@pytest.mark.parametrize(
    ("program", "dtype", "rebias"),
    [("_FLOAT8_TO_BFLOAT16", torch.bfloat16, 2.0**120), ("_FLOAT8_TO_FLOAT16", torch.float16, 256.0)],
)
def test_float8_has_its_value_once_the_bias_is_moved(program, dtype, rebias):
    got = unpacked(getattr(unpack, program).value, ALL_BYTES, dtype).flatten(1) * rebias
    expected = ALL_BYTES.to(torch.uint8).view(torch.float8_e4m3fn).float()
    expected[ALL_BYTES == 0x7F], expected[ALL_BYTES == 0xFF] = 480.0, -480.0  # not numbers
    assert torch.equal(got, expected)


def test_declared_registers_are_those_that_are_used():
    for program in (unpack.UNPACK_NIBBLES.value, unpack.UNPACK_FLOATS.value):
        declared = re.search(r"\.reg \.b32 ([^;]*);", program)[1].split(", ")
        assert set(declared) == set(re.findall(r"\b(low|high|shifted|first|second|signs)\b", program))
