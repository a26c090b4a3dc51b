"""One device's share of a replica, as a plain class: the shard actor and the local engine are shells around it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from ..cluster import startup
from ..cluster.kv_memory import DeviceMemory
from ..cluster.model_spec import load_spec
from ..cluster.startup import StartupClock
from ..cluster.step import StepPlan, StepResult
from ..cluster.topology import weight_bytes
from ..kernels.backend import load_kernels
from ..kernels.interface import Kernels
from . import device_memory
from .background import Background
from .collectives import Collectives, connect
from .decoder import Decoder
from .device import resolve_device, resolve_dtype, resolve_kv_dtype
from .executor import Pending
from .kv_cache import KVCache
from .out_of_memory import Stage, out_of_memory_named
from .runner import Runner, new_runner
from .sequence_scorer import SequenceScorer
from .shard_config import ShardConfig
from .weights import load_weights


class Shard:
    """Goes through `connect`, `load`, perhaps `memory`, and `allocate` in this order, then runs plans; `close` at any
    time.

    `connect`, `memory` on a GPU, and `allocate` return when the other shards of the replica have got there too. All
    calls come from one thread at a time.
    """

    def __init__(self, config: ShardConfig, clock: StartupClock | None = None) -> None:
        """Read the model's config and choose device and dtype.

        Args:
            clock: notes what the phases take from here on; None: a new one.

        Raises:
            CheckpointError: the folder holds no model that is supported.
            ConfigError: there is no such device here, or it cannot do what is asked.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.clock = clock or StartupClock()
        self.spec = load_spec(config.folder)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.spec.dtype, self.device)
        self.kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, self.dtype, self.device)
        self._collectives: Collectives | None = None
        self._decoder: Decoder | None = None
        self._kernels: Kernels | None = None
        self._runner: Runner | None = None
        self._cache: KVCache | None = None
        self._weight_bytes = 0

    def connect(self) -> None:
        """Meet the other shards.

        Raises:
            EngineError: not all came in time.
        """
        config = self.config
        with self.clock.phase(startup.CONNECT):
            self._collectives = connect(
                config.layout, config.init_method, config.timeout_seconds, self.device, config.listen_fd
            )

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read this shard's weights; `progress` is called with (bytes done, bytes in all). Kernels that need compiling
        are compiled meanwhile.

        Raises:
            CheckpointError: names the file or tensor at fault.
            ConfigError: the weights do not fit the device.
        """
        assert self._collectives is not None, "connect first"
        config = self.config
        with out_of_memory_named(Stage.WEIGHTS, config):
            kernels = self._kernels = load_kernels(self.device, self.dtype)
            compiling = Background(self._rehearsal(), "compile-kernels")
            with self.clock.phase(startup.WEIGHTS):
                weights = load_weights(
                    config.folder,
                    self.spec,
                    config.layout,
                    self.dtype,
                    self.device,
                    progress,
                    load_format=config.load_format,
                )
            with self.clock.phase(startup.KERNELS):
                compiling.wait()
                self._decoder = Decoder(
                    self.spec,
                    config.layout,
                    weights,
                    kernels,
                    self._collectives,
                    config.max_model_len,
                    self.dtype,
                    self.device,
                )
        self._weight_bytes = weight_bytes(self.spec, config.layout, self.dtype.itemsize) - kernels.saved_bytes

    def memory(self) -> DeviceMemory:
        """What the device has left; to be asked of all shards when all have loaded. On a GPU they run the largest step
        for it, together.

        Raises:
            ConfigError: the largest step does not fit the device.
        """
        if self.device.type == "cpu":
            return device_memory.measure_node(self._weight_bytes)
        return self.profile(device_memory.CudaGauge(self.device))

    def profile(self, gauge: device_memory.Gauge) -> DeviceMemory:
        """What `gauge` says before the largest step, and what that step takes."""

        def step() -> None:
            self._new_runner(num_blocks=1).profile()

        with self.clock.phase(startup.PROFILE), out_of_memory_named(Stage.PROFILE, self.config):
            return device_memory.measure_step(gauge, step, self._weight_bytes)

    def allocate(self, num_blocks: int) -> None:
        """Allocate the KV cache (`num_blocks` with the null block) and run a step of each kind to warm up.

        Raises:
            ConfigError: the cache does not fit the device.
        """
        with out_of_memory_named(Stage.CACHE, self.config):
            with self.clock.phase(startup.KV_CACHE):
                self._runner = self._new_runner(num_blocks)
            with self.clock.phase(startup.WARM_UP):
                self._runner.warm_up()
        if self.device.type == "cuda":
            # What is there now stays; a search for garbage in it would hold up a step.
            gc.collect()
            gc.freeze()

    def launch(self, plan: StepPlan) -> StepResult | Pending | None:
        """Start a plan; None unless this is the output shard. See `Runner.launch`.

        Raises:
            EngineError: the device's memory was full.
        """
        assert self._runner is not None, "allocate first"
        with out_of_memory_named(Stage.STEP, self.config):
            return self._runner.launch(plan)

    def run(self, plan: StepPlan) -> StepResult | None:
        """Execute a plan; None unless this is the output shard. See `Runner.run`.

        Raises:
            EngineError: the device's memory was full.
        """
        assert self._runner is not None, "allocate first"
        with out_of_memory_named(Stage.STEP, self.config):
            return self._runner.run(plan)

    def scorer(self) -> SequenceScorer:
        """Scores whole sequences with this shard's layers and KV cache, whose blocks it overwrites."""
        assert self._decoder is not None, "load first"
        assert self._cache is not None, "allocate first"
        return SequenceScorer(self._decoder, self._cache, self.spec, self.config, self.device)

    @property
    def weight_bytes(self) -> int:
        """What the weights take in the device's memory; 0 before `load`."""
        return self._weight_bytes

    def _rehearsal(self) -> Callable[[], None] | None:
        """What compiles the kernels of a GPU; None if nothing needs compiling."""
        assert self._kernels is not None
        if not self._kernels.steps_on_device or self.device.type == "cpu":  # Triton's interpreter compiles nothing
            return None
        from .rehearsal import rehearse  # a CPU does without Triton

        return lambda: rehearse(self.spec, self.config, self.device, self.dtype)

    def _new_runner(self, num_blocks: int) -> Runner:
        """A runner with a KV cache of `num_blocks`."""
        assert self._collectives is not None, "connect first"
        assert self._decoder is not None, "load first"
        config = self.config
        assert self._kernels is not None, "load first"
        cache = self._cache = KVCache(
            self.spec, config.layout, num_blocks, config.block_size, self.kv_dtype, self.device
        )
        return new_runner(
            self._decoder,
            cache,
            self.spec,
            config.layout,
            self._collectives,
            self._kernels,
            config,
            self.device,
            self.dtype,
        )

    def close(self) -> None:
        """Leave the group and free the device's memory."""
        self._runner = self._decoder = self._kernels = self._cache = None
        if self.device.type == "cuda":
            gc.collect()  # graphs hold collectives, which cannot end before them
        if self._collectives is not None:
            self._collectives.close()
            self._collectives = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
