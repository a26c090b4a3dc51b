"""What a shard is told before it starts. Free of torch, so that whoever starts shards need not import it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..cluster.topology import ShardLayout


class ShardConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The same on all shards of a replica but for `layout`."""

    folder: Path
    """Model folder in Hugging Face format."""
    layout: ShardLayout = ShardLayout()
    dtype: str = "auto"
    """"auto" (`actors/device.py`) or one of `model_spec.DTYPES`."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    load_format: str = "auto"
    """"auto": the folder's safetensors; "dummy": random weights (`actors/dummy_weights.py`)."""
    kv_cache_dtype: str = "auto"
    """"auto": the dtype; "int8" or "fp8": with a scale per token and head (`kernels/quantised_kv.py`)."""
    block_size: int = 16
    max_num_seqs: int = 64
    max_model_len: int = 2048
    max_num_batched_tokens: int = 1024
    num_threads: int | None = None
    """CPU threads; None: as torch chooses."""
    init_method: str = ""
    """torch.distributed's rendezvous, such as tcp://127.0.0.1:29500; not read by a replica of one shard."""
    listen_fd: int | None = None
    """On rank 0, a socket bound to `init_method`, to be taken over; None: the shard opens one."""
    timeout_seconds: float = 300.0
    """How long a shard waits for the others, when they meet and in every tensor operation."""
