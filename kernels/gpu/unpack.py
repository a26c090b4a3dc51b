"""From the bytes of a quantised weight to numbers that a matrix unit takes, in registers.

Four bits become a 16-bit float by putting them under the exponent of 128 (bfloat16: 0x4300) or 1024 (float16: 0x6400):
the number is then that power of two plus the integer, exactly, and one subtraction removes the power and the zero
(Kim et al., arXiv:2211.10017). One instruction spreads two bytes and sets both exponents.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import INTERPRETED

UNPACK_NIBBLES = tl.constexpr("""{
    .reg .b32 low, high, shifted;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.u32 shifted, $4, 4;
    and.b32 high, shifted, 0x0f0f0f0f;
    prmt.b32 $0, low, EXPONENTS, 0x4140;
    prmt.b32 $1, low, EXPONENTS, 0x4342;
    prmt.b32 $2, high, EXPONENTS, 0x4140;
    prmt.b32 $3, high, EXPONENTS, 0x4342;
}""")
"""Four bytes ($4) → four low halves ($0, $1) and four high halves ($2, $3), each as two 16-bit floats to a register.
`prmt` chooses bytes: 0 to 3 are of its first operand, 4 to 7 of its second."""
_BFLOAT16 = tl.constexpr(UNPACK_NIBBLES.value.replace("EXPONENTS", "0x43434343"))
_FLOAT16 = tl.constexpr(UNPACK_NIBBLES.value.replace("EXPONENTS", "0x64646464"))

UNPACK_FLOATS = tl.constexpr("""{
    .reg .b32 first, second, signs;
    prmt.b32 first, $2, 0, 0x1404;
    prmt.b32 second, $2, 0, 0x3424;
    and.b32 signs, first, 0x80008000;
    shr.u32 first, first, SHIFT;
    and.b32 first, first, NUMBERS;
    or.b32 $0, first, signs;
    and.b32 signs, second, 0x80008000;
    shr.u32 second, second, SHIFT;
    and.b32 second, second, NUMBERS;
    or.b32 $1, second, signs;
}""")
"""Four float8_e4m3fn ($2) → four 16-bit floats ($0, $1) whose exponents still have the bias of the small ones."""
_FLOAT8_TO_BFLOAT16 = tl.constexpr(UNPACK_FLOATS.value.replace("SHIFT", "4").replace("NUMBERS", "0x07f007f0"))
_FLOAT8_TO_FLOAT16 = tl.constexpr(UNPACK_FLOATS.value.replace("SHIFT", "1").replace("NUMBERS", "0x3f803f80"))


@triton.jit
def unpack_nibbles(packed, low_zero, high_zero, DTYPE: tl.constexpr):
    """Low and high halves of bytes less their zeros, in DTYPE (in float32 under the interpreter); exact.

    Args:
        packed: [K, N] or [N, K] uint8.
        low_zero, high_zero: [1, N] or [N, 1] float32, or a constant.
    """
    if INTERPRETED or DTYPE.is_fp32():
        low, high = (packed & 15).to(tl.float32) - low_zero, (packed >> 4).to(tl.float32) - high_zero
    else:
        if DTYPE.is_bf16():
            low, high = tl.inline_asm_elementwise(
                _BFLOAT16, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                _FLOAT16, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
        base: tl.constexpr = 128.0 if DTYPE.is_bf16() else 1024.0
        low -= (low_zero + base).to(DTYPE)
        high -= (high_zero + base).to(DTYPE)
    return low, high


@triton.jit
def unpack_bytes(packed, zero, FLOAT: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes less their zero, in DTYPE (in float32 under the interpreter); exact.

    Args:
        packed: [K, N] or [N, K] uint8.
        zero: [1, N] or [N, 1] float32, or a constant; not used if FLOAT.
        FLOAT: the bytes are float8_e4m3fn. Not by a conversion, which GPUs before Ada and Hopper lack: the exponent is
            put where the larger format has its own, and a multiplication moves it from the one bias to the other. What
            is not a number becomes 480.
    """
    wide = packed.to(tl.int32)
    if INTERPRETED or DTYPE.is_fp32():
        if FLOAT:
            number = (((wide & 127) << 20) | ((wide & 128) << 24)).to(tl.float32, bitcast=True) * 2.0**120
        else:
            number = wide.to(tl.float32) - zero
    elif FLOAT:
        if DTYPE.is_bf16():
            number = tl.inline_asm_elementwise(
                _FLOAT8_TO_BFLOAT16, "=&r,=&r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            number = tl.inline_asm_elementwise(
                _FLOAT8_TO_FLOAT16, "=&r,=&r,r", [packed], dtype=tl.float16, is_pure=True, pack=4
            )
        number *= 2.0**120 if DTYPE.is_bf16() else 256.0
    else:
        # 2²³ has room for the integer in its last bits: no conversion, which runs at a fraction of the speed.
        number = ((wide | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)).to(DTYPE)
    return number
