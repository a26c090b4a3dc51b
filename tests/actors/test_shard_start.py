"""A shard's start: kernels compile beside reading, a step is measured, phases are timed, a full GPU is explained."""

from __future__ import annotations

import contextlib
import logging
import re
import threading

import pytest
import torch
from fake_gpu import FakeGpu, GiB
from tiny_models import make_tiny_model

from raytroupe.actors import shard as shard_module
from raytroupe.actors.background import Background
from raytroupe.actors.local_engine import LocalEngine
from raytroupe.actors.model_runner import ModelRunner
from raytroupe.actors.shard import Shard
from raytroupe.actors.shard_config import ShardConfig
from raytroupe.cluster.errors import CheckpointError, ConfigError, EngineError
from raytroupe.cluster.request import SamplingParams
from raytroupe.cluster.startup import PHASES
from raytroupe.cluster.step import NewSequence, StepPlan, StepResult

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def shard(folder):
    shard = Shard(
        ShardConfig(
            folder=folder,
            dtype="float32",
            device="cpu",
            block_size=8,
            max_num_seqs=4,
            max_model_len=40,
            max_num_batched_tokens=64,
        )
    )
    shard.connect()
    yield shard
    shard.close()


def test_kernels_are_compiled_in_a_thread_while_weights_are_read(shard, monkeypatch):
    """Each waits for the other to have begun: neither would end if they came one after the other."""
    reading, compiling = threading.Event(), threading.Event()
    threads = []

    def compile_kernels() -> None:
        threads.append(threading.current_thread())
        compiling.set()
        assert reading.wait(60)

    def progress(done: int, total: int) -> None:
        reading.set()
        assert compiling.wait(60)

    monkeypatch.setattr(Shard, "_rehearsal", lambda shard: compile_kernels)
    shard.load(progress)
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()
    shard.allocate(8)


def test_a_fault_of_compiling_ends_the_start(shard, monkeypatch):
    def fail() -> None:
        raise ValueError("no such instruction")

    monkeypatch.setattr(Shard, "_rehearsal", lambda shard: fail)
    with pytest.raises(ValueError, match="no such instruction"):
        shard.load()


def test_a_fault_of_reading_does_not_wait_for_compiling(shard, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(Shard, "_rehearsal", lambda shard: release.wait)

    def fail(*arguments, **options) -> None:
        raise CheckpointError("model.safetensors is gone")

    monkeypatch.setattr(shard_module, "load_weights", fail)
    try:
        with pytest.raises(CheckpointError, match="is gone"):
            shard.load()
    finally:
        release.set()


def test_nothing_in_the_background_is_done_at_once():
    Background(None, "nothing").wait()


def test_the_largest_step_is_measured_on_a_cache_of_one_block(shard, monkeypatch):
    gpu = FakeGpu(libraries=GiB, tensors=2 * GiB, cached=GiB)

    run = ModelRunner.run

    def run_on_gpu(runner: ModelRunner, plan: StepPlan) -> StepResult | None:
        assert runner._kv_cache.num_blocks == 1
        assert (len(plan.slots), sum(plan.counts)) == (4, 64)
        gpu.take(3 * GiB)
        result = run(runner, plan)
        gpu.drop(3 * GiB)
        return result

    shard.load()
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", run_on_gpu)
        memory = shard.profile(gpu)
    assert (memory.free, memory.step) == (77 * GiB, 3 * GiB)
    assert memory.weights == shard.memory().weights
    shard.allocate(8)  # measuring leaves the shard as it was
    prompt = NewSequence(0, [5, 6, 7], 3, SamplingParams(temperature=0.0))
    result = shard.run(StepPlan(0, [prompt], [0], [0], [3], [True], 0, [(0, [1])], []))
    assert len(result.tokens) == 1
    keys = shard._runner._kv_cache.layer(0).keys
    assert keys[:, 1, :3].any()
    assert "profile" in shard.clock.seconds


def fail(*_arguments, **_options) -> None:
    raise FULL


def test_a_full_device_is_explained_at_every_stage(shard, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shard_module, "load_weights", fail)
        with pytest.raises(ConfigError, match="tensor_parallel_size"):
            shard.load()
    shard.load()
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "profile", fail)
        with pytest.raises(ConfigError, match="max_num_batched_tokens"):
            shard.profile(FakeGpu(libraries=0, tensors=0, cached=0))
    with monkeypatch.context() as patch:
        patch.setattr(shard_module, "KVCache", fail)
        with pytest.raises(ConfigError, match="kv_cache_memory"):
            shard.allocate(8)
    shard.allocate(8)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", fail)
        with pytest.raises(EngineError, match="gpu_memory_utilization"):
            shard.run(StepPlan(0, [], [], [], [], [], 0, [], []))


def test_every_phase_of_a_start_is_timed(shard):
    shard.load()
    shard.memory()
    shard.allocate(8)
    assert set(shard.clock.seconds) == {"connect", "weights", "kernels", "KV cache", "warm-up"}


def test_the_local_engine_says_where_the_time_went(folder, caplog):
    with (
        caplog.at_level(logging.INFO, logger="raytroupe.actors.local_engine"),
        contextlib.closing(LocalEngine(folder, dtype="float32", device="cpu", num_threads=1, max_num_seqs=2)) as engine,
    ):
        seconds = engine.shard.clock.seconds
    line = next(message for message in caplog.messages if "start-up: " in message)
    total, *parts = [round(10 * float(figure)) for figure in re.findall(r"\d+\.\d", line.partition("start-up: ")[2])]
    assert total == sum(parts)
    assert set(seconds) == set(PHASES) - {"process", "profile"}
    for name, value in seconds.items():
        assert (name in line) == (round(10 * value) > 0)
    assert any(message.endswith(engine.memory.reasoning) for message in caplog.messages)
