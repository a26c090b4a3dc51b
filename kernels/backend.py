"""The kernels of one device and dtype, chosen once when a shard loads."""

from __future__ import annotations

import os

import torch

from . import native_library
from .interface import Kernels
from .native_kernels import NativeKernels
from .torch_kernels import TorchKernels

CHOICE = "TROUPE_KERNELS"
"""Environment variable: "torch" serves without compiled kernels, for comparison."""


def load_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for a device and dtype. Not shared between decoders: they have a workspace."""
    if native_library.supports(device, dtype) and os.environ.get(CHOICE) != "torch":
        # With narrower vectors the library's product is the faster one (docs/decisions.md).
        wide = native_library.instruction_set() in native_library.WIDE_INSTRUCTION_SETS
        return NativeKernels(dtype, compiled_products=wide)
    return TorchKernels(device, dtype)
