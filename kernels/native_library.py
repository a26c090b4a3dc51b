"""The compiled kernels: their structs, `kernels/native/operations.h` field by field, and the call that runs them.

The library is built when the package is installed, if there is a C++ compiler; without it the torch path serves.
Threads come from the OpenMP runtime that torch has loaded already, so that there is one pool of them.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from functools import cache
from importlib import machinery
from pathlib import Path

import torch
from torch import Tensor

_POINTER, _INT32, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
"""Each needs what those before it need."""
WIDE_INSTRUCTION_SETS = ("avx512", "avx512_vnni", "avx512_bf16")
"""With registers of 64 bytes."""
UNPACKING_INSTRUCTION_SETS = ("avx512_bf16",)
"""Whose product reads compressed weights as fast as others; the rest can."""


class Kind(enum.IntEnum):
    """`enum Kind`."""

    RMS_NORM = 0
    LINEAR = 1
    ROTATE_STORE = 2
    ATTENTION = 3
    GATED_ACTIVATION = 4
    ADD = 5
    EMBED = 6
    ROTATION = 7
    ARGMAX = 8
    QUANTISED_LINEAR = 9


class Epilogue(enum.IntEnum):
    """`enum Epilogue`."""

    STORE = 0
    ADD_TO = 1
    GATED = 2


ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
"""`enum Activation`, by the names of `kernels/activation.py`."""


class Stored(enum.IntEnum):
    """`enum Stored`."""

    AS_COMPUTED = 0
    INT8 = 1
    FLOAT8 = 2


class Step(ctypes.Structure):
    """`struct Step`."""

    _fields_ = [
        ("slot_mapping", _POINTER),
        ("query_start", _POINTER),
        ("context_lens", _POINTER),
        ("block_tables", _POINTER),
        ("rows", _INT32),
        ("sequences", _INT32),
        ("decode_rows", _INT32),
        ("table_width", _INT32),
        ("threads", _INT32),
        ("tokens", _POINTER),
        ("positions", _POINTER),
    ]


class RmsNorm(ctypes.Structure):
    """`struct RmsNorm`."""

    _fields_ = [
        ("kind", _INT32),
        ("bfloat16", _INT32),
        ("width", _INT32),
        ("eps", _FLOAT),
        ("x", _POINTER),
        ("out", _POINTER),
        ("weight", _POINTER),
        ("gather", _POINTER),
        ("x_stride", _INT64),
        ("out_stride", _INT64),
    ]


class LinearOperation(ctypes.Structure):
    """`struct Linear`."""

    _fields_ = [
        ("kind", _INT32),
        ("bfloat16", _INT32),
        ("compressed", _INT32),
        ("in_features", _INT32),
        ("out_features", _INT32),
        ("epilogue", _INT32),
        ("activation", _INT32),
        ("out_float32", _INT32),
        ("alpha", _FLOAT),
        ("x", _POINTER),
        ("weight", _POINTER),
        ("bias", _POINTER),
        ("out", _POINTER),
        ("x_stride", _INT64),
        ("out_stride", _INT64),
    ]


class QuantisedLinearOperation(LinearOperation):
    """`struct QuantisedLinear`, which continues `struct Linear`."""

    _fields_ = [
        ("bits", _INT32),
        ("group_size", _INT32),
        ("scale_kind", _INT32),
        ("zeros", _INT32),
        ("row_scale", _INT32),
        ("x_features", _INT32),
        ("order", _POINTER),
        ("quantised", _POINTER),
    ]


class RotateStore(ctypes.Structure):
    """`struct RotateStore`."""

    _fields_ = [
        ("kind", _INT32),
        ("bfloat16", _INT32),
        ("heads", _INT32),
        ("kv_heads", _INT32),
        ("head_dim", _INT32),
        ("rotary_dim", _INT32),
        ("block_size", _INT32),
        ("eps", _FLOAT),
        ("qkv", _POINTER),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("query_norm", _POINTER),
        ("key_norm", _POINTER),
        ("k_cache", _POINTER),
        ("v_cache", _POINTER),
        ("stride", _INT64),
        ("num_blocks", _INT64),
        ("k_scales", _POINTER),
        ("v_scales", _POINTER),
        ("stored", _INT32),
    ]


class AttentionOperation(ctypes.Structure):
    """`struct Attention`."""

    _fields_ = [
        ("kind", _INT32),
        ("bfloat16", _INT32),
        ("heads", _INT32),
        ("kv_heads", _INT32),
        ("head_dim", _INT32),
        ("block_size", _INT32),
        ("window", _INT32),
        ("scale", _FLOAT),
        ("softcap", _FLOAT),
        ("query", _POINTER),
        ("k_cache", _POINTER),
        ("v_cache", _POINTER),
        ("out", _POINTER),
        ("query_stride", _INT64),
        ("out_stride", _INT64),
        ("num_blocks", _INT64),
        ("k_scales", _POINTER),
        ("v_scales", _POINTER),
        ("stored", _INT32),
    ]


class GatedActivation(ctypes.Structure):
    """`struct GatedActivation`."""

    _fields_ = [
        ("kind", _INT32),
        ("bfloat16", _INT32),
        ("width", _INT32),
        ("activation", _INT32),
        ("x", _POINTER),
        ("out", _POINTER),
        ("x_stride", _INT64),
        ("out_stride", _INT64),
    ]


class Add(ctypes.Structure):
    """`struct Add`."""

    _fields_ = [
        ("kind", _INT32),
        ("bfloat16", _INT32),
        ("width", _INT32),
        ("alpha", _FLOAT),
        ("x", _POINTER),
        ("out", _POINTER),
        ("x_stride", _INT64),
        ("out_stride", _INT64),
    ]


class Embed(ctypes.Structure):
    """`struct Embed`."""

    _fields_ = [
        ("kind", _INT32),
        ("bfloat16", _INT32),
        ("width", _INT32),
        ("packed", _INT32),
        ("compressed", _INT32),
        ("scale", _FLOAT),
        ("weight", _POINTER),
        ("out", _POINTER),
        ("out_stride", _INT64),
    ]


class RotationOperation(ctypes.Structure):
    """`struct Rotation`."""

    _fields_ = [
        ("kind", _INT32),
        ("width", _INT32),
        ("factor", _FLOAT),
        ("inverse_frequencies", _POINTER),
        ("cos", _POINTER),
        ("sin", _POINTER),
    ]


class ArgMax(ctypes.Structure):
    """`struct ArgMax`."""

    _fields_ = [
        ("kind", _INT32),
        ("width", _INT32),
        ("x", _POINTER),
        ("out", _POINTER),
        ("x_stride", _INT64),
    ]


Operation = (
    RmsNorm
    | LinearOperation
    | QuantisedLinearOperation
    | RotateStore
    | AttentionOperation
    | GatedActivation
    | Add
    | Embed
    | RotationOperation
    | ArgMax
)


class OperationList:
    """Operations in the order in which they run; they are kept alive, the tensors behind their pointers are not."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = list(operations)
        self._addresses = (_POINTER * len(operations))(*map(ctypes.addressof, operations))

    def run(self, step: Step) -> None:
        """Run all on `step`, without the interpreter lock.

        Raises:
            MemoryError: there is none for the scratch space of a thread.
        """
        if _library().troupe_run(self._addresses, len(self._operations), ctypes.byref(step)):
            raise MemoryError(f"no memory for the scratch space of a step with {step.rows} tokens")


def is_built() -> bool:
    """Whether the kernels were compiled at installation."""
    return _path() is not None


def instruction_set() -> str:
    """The one of `INSTRUCTION_SETS` in use: at first the best that this processor has."""
    return _library().troupe_instruction_set().decode()


def use_instruction_set(name: str) -> None:
    """Use another one, for tests and measurements.

    Raises:
        ValueError: this processor lacks it.
    """
    if _library().troupe_use_instruction_set(name.encode()):
        raise ValueError(f"this processor has no instruction set {name!r}; known are {', '.join(INSTRUCTION_SETS)}")


def compressed_sizes(packed: Tensor) -> Tensor:
    """What the groups of a packed weight would take if they were compressed: see `compressed_weight.h`.

    Args:
        packed: [groups, steps, 4, 16, 2] bfloat16, contiguous.

    Returns:
        [groups] int64: bytes.
    """
    assert packed.is_contiguous()
    groups, steps = packed.shape[:2]
    sizes = torch.empty(groups, dtype=torch.int64)
    _library().troupe_compressed_sizes(packed.data_ptr(), groups, steps, sizes.data_ptr(), torch.get_num_threads())
    return sizes


def compress(packed: Tensor, places: Tensor, target: Tensor) -> None:
    """Write the groups of a packed weight, compressed, to `target`, which is zero and aligned to a cache line.

    Args:
        packed: [groups, steps, 4, 16, 2] bfloat16, contiguous.
        places: [groups or more] int64: where each begins in `target`, in bytes.
        target: uint8, with room for all of them.
    """
    assert packed.is_contiguous()
    groups, steps = packed.shape[:2]
    pointers = (places.data_ptr(), target.data_ptr())
    _library().troupe_compress(packed.data_ptr(), groups, steps, *pointers, torch.get_num_threads())


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for `dtype` on `device`."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and is_built()


@cache
def _path() -> Path | None:
    for suffix in machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            return path
    return None


@cache
def _library() -> ctypes.CDLL:
    path = _path()
    assert path is not None, "ask is_built first"
    library = ctypes.CDLL(str(path))
    library.troupe_instruction_set.restype = ctypes.c_char_p
    library.troupe_use_instruction_set.argtypes = [ctypes.c_char_p]
    library.troupe_run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    library.troupe_run.restype = ctypes.c_int
    library.troupe_compressed_sizes.argtypes = [_POINTER, _INT64, _INT64, _POINTER, ctypes.c_int]
    library.troupe_compressed_sizes.restype = None
    library.troupe_compress.argtypes = [_POINTER, _INT64, _INT64, _POINTER, _POINTER, ctypes.c_int]
    library.troupe_compress.restype = None
    return library
