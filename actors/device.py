"""What "auto" means for a shard: its device and the dtype it computes in."""

from __future__ import annotations

from pathlib import Path

import torch

from ..cluster.errors import ConfigError

_EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_FP8_CAPABILITY = (8, 9)
"""Of the first GPUs with instructions for e4m3."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(asked: str) -> torch.device:
    """`auto` takes the GPU that Ray or CUDA_VISIBLE_DEVICES shows first, else the CPU.

    Raises:
        ConfigError: "cuda" was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ConfigError("device = 'cuda': this process sees no CUDA device; use 'cpu' or give the node a GPU")
    return torch.device("cuda", 0) if available and asked != "cpu" else torch.device("cpu")


def resolve_dtype(asked: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """The dtype of weights, activations and, by default, KV cache.

    "auto" keeps the checkpoint's where the device computes in it at full speed. A CPU does so in bfloat16 only with
    AVX-512-BF16 or AMX-BF16; it never does in float16, which becomes bfloat16 there. Without them it is float32.

    Args:
        asked: "auto", "float32", "bfloat16" or "float16".
        checkpoint: the checkpoint's dtype, one of the latter three.
    """
    if asked != "auto":
        return _DTYPES[asked]
    if checkpoint == "float32":
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return _DTYPES[checkpoint] if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def resolve_kv_dtype(asked: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the KV cache.

    Args:
        asked: "auto", "int8" or "fp8".
        dtype: what the shard computes in, which "auto" means.

    Raises:
        ConfigError: the device lacks instructions for it.
    """
    if asked == "auto":
        return dtype
    if (
        asked == "fp8"
        and device.type == "cuda"
        and (found := torch.cuda.get_device_capability(device)) < _FP8_CAPABILITY
    ):
        raise ConfigError(
            f"kv_cache_dtype = 'fp8': the GPU has compute capability {found[0]}.{found[1]} and fp8 needs "
            f"{_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]}; use 'int8', which is as small"
        )
    return _EIGHT_BITS[asked]


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; False where the kernel does not say."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags
