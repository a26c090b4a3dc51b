"""What the memory benchmark reads and subtracts."""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import pytest

from raytroupe.cluster.errors import EngineError
from raytroupe.deploy.bench.memory import (
    MIB,
    ProcessMemory,
    prompts,
    read_memory,
    reported_weights,
    row,
    shard_process,
)


def test_figures_of_the_kernel(tmp_path: Path) -> None:
    this = psutil.Process()
    folder = tmp_path / str(this.pid)
    folder.mkdir()
    (folder / "smaps_rollup").write_text("5586-7fff ---p 0 00:00 0  [rollup]\nRss:  900 kB\nAnonymous:  500 kB\n")
    (folder / "status").write_text("Name:\tray::ShardActor\nVmHWM:\t 1200 kB\nRssShmem:\t 100 kB\nThreads:\t3\n")
    memory = read_memory(this, tmp_path)
    assert memory == ProcessMemory(900 * 1024, 500 * 1024, 100 * 1024, 300 * 1024, 1200 * 1024)


def test_private_and_shared_memory_of_a_real_process_are_told_apart() -> None:
    this = psutil.Process()
    before = read_memory(this)
    private = mmap.mmap(-1, 32 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    shared = mmap.mmap(-1, 16 * MIB)
    private.write(b"x" * (32 * MIB))
    shared.write(b"x" * (16 * MIB))
    after = read_memory(this)
    assert after.anonymous - before.anonymous >= 32 * MIB
    assert after.shared - before.shared >= 16 * MIB
    assert after.peak >= after.resident


def test_weights_and_kv_cache_are_subtracted() -> None:
    memory = ProcessMemory(1000 * MIB, 800 * MIB, 0, 200 * MIB, 1200 * MIB)
    line = row("under load", memory, memory.resident, 500 * MIB, 300 * MIB)
    assert (line["besides"], line["ratio"], line["file"]) == (200.0, 0.5, 200.0)
    line = row("peak", memory, memory.peak, 500 * MIB, 300 * MIB)
    assert (line["besides"], line["ratio"]) == (400.0, 1.0)
    assert "file" not in line


def test_prompts_cover_the_cache_and_share_no_beginning() -> None:
    made = prompts(100, 30, 1000)
    assert [len(prompt) for prompt in made] == [30] * 4
    assert len({tuple(prompt[:8]) for prompt in made}) == 4


def test_a_server_without_a_shard_is_an_error() -> None:
    with pytest.raises(EngineError, match="0 shard processes"):
        shard_process(psutil.Process().pid)


def test_the_size_of_the_weights_is_the_servers_own_word() -> None:
    lines = ["demo: 2 threads", "KV cache: 256 MiB of 22.4 GiB free (weights 384.5 MiB) = 511 blocks of 16 tokens"]
    assert reported_weights(lines) == 384.5 * MIB
    with pytest.raises(EngineError, match="no line with"):
        reported_weights(lines[:1])
