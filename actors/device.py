"""What "auto" means for a shard: its device and the dtype it computes in."""

from __future__ import annotations

from pathlib import Path

import torch

from ..cluster.errors import ConfigError

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
    """The dtype of weights, activations and KV cache.

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


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; False where the kernel does not say."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags
