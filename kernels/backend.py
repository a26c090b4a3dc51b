"""The kernels of one device and dtype, chosen once when a shard loads."""

from __future__ import annotations

import os

import torch

from . import native_library
from .interface import Kernels
from .native_kernels import NativeKernels
from .torch_kernels import TorchKernels

CHOICE = "TROUPE_KERNELS"
"""Environment variable: "torch" serves without kernels of ours, for comparison; "triton" runs those for GPUs on a CPU,
under Triton's interpreter, for tests."""


def load_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for a device and dtype. Not shared between decoders: they have a workspace."""
    choice = os.environ.get(CHOICE)
    if choice == "torch":
        return TorchKernels(device, dtype)
    if device.type == "cuda" or choice == "triton":
        from .gpu.triton_kernels import TritonKernels  # a CPU does without Triton

        return TritonKernels(device, dtype)
    if native_library.supports(device, dtype):
        # With narrower vectors the library's product is the faster one (docs/decisions.md).
        wide = native_library.instruction_set() in native_library.WIDE_INSTRUCTION_SETS
        return NativeKernels(dtype, compiled_products=wide)
    return TorchKernels(device, dtype)
