"""One device's share of a replica, as a plain class: the shard actor and the local engine are shells around it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..cluster.kv_memory import DeviceMemory
from ..cluster.model_spec import load_spec
from ..cluster.step import StepPlan, StepResult
from ..cluster.topology import weight_bytes
from ..kernels.backend import load_kernels
from . import device_memory
from .collectives import Collectives, connect
from .decoder import Decoder
from .device import resolve_device, resolve_dtype
from .kv_cache import KVCache
from .model_runner import ModelRunner
from .shard_config import ShardConfig
from .weights import load_weights


class Shard:
    """Goes through `connect`, `load` and `allocate` in this order, then runs plans; `close` at any time.

    `connect` and `allocate` return when the other shards of the replica have got there too. All calls come from one
    thread at a time.
    """

    def __init__(self, config: ShardConfig) -> None:
        """Read the model's config and choose device and dtype.

        Raises:
            CheckpointError: the folder holds no model that is supported.
            ConfigError: there is no such device here.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.spec = load_spec(config.folder)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.spec.dtype, self.device)
        self._collectives: Collectives | None = None
        self._decoder: Decoder | None = None
        self._runner: ModelRunner | None = None
        self._weight_bytes = 0

    def connect(self) -> None:
        """Meet the other shards.

        Raises:
            EngineError: not all came in time.
        """
        config = self.config
        self._collectives = connect(
            config.layout, config.init_method, config.timeout_seconds, self.device, config.listen_fd
        )

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read this shard's weights; `progress` is called with (bytes done, bytes in all).

        Raises:
            CheckpointError: names the file or tensor at fault.
        """
        assert self._collectives is not None, "connect first"
        config = self.config
        weights = load_weights(config.folder, self.spec, config.layout, self.dtype, self.device, progress)
        kernels = load_kernels(self.device, self.dtype)
        self._decoder = Decoder(self.spec, config.layout, weights, kernels, self._collectives, config.max_model_len)
        self._weight_bytes = weight_bytes(self.spec, config.layout, self.dtype.itemsize) - kernels.saved_bytes

    def memory(self) -> DeviceMemory:
        """What the device has left; to be asked when all shards on it have loaded."""
        return device_memory.measure(self.device, self._weight_bytes)

    def allocate(self, num_blocks: int) -> None:
        """Allocate the KV cache (`num_blocks` with the null block) and run a step of each kind to warm up."""
        assert self._collectives is not None, "connect first"
        assert self._decoder is not None, "load first"
        config = self.config
        self._runner = ModelRunner(
            self._decoder,
            KVCache(self.spec, config.layout, num_blocks, config.block_size, self.dtype, self.device),
            self.spec,
            config.layout,
            self._collectives,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            device=self.device,
            dtype=self.dtype,
        )
        self._runner.warm_up()

    def run(self, plan: StepPlan) -> StepResult | None:
        """Execute a plan; None unless this is the output shard. See `ModelRunner.run`."""
        assert self._runner is not None, "allocate first"
        return self._runner.run(plan)

    def close(self) -> None:
        """Leave the group and free the device's memory."""
        self._runner = self._decoder = None
        if self._collectives is not None:
            self._collectives.close()
            self._collectives = None
