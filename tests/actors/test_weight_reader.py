"""Parts of files reach their places: in any dtype, cut in any way, by any number of readers, and faults are named."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from paged_batch import CPU
from safetensors.torch import save_file

from raytroupe.actors import weight_reader
from raytroupe.actors.checkpoint import Checkpoint
from raytroupe.actors.staging import ALIGNMENT, NUM_BUFFERS, Staging
from raytroupe.actors.weight_names import TensorSlice
from raytroupe.actors.weight_reader import plan_reads, read_weights
from raytroupe.cluster.errors import CheckpointError

STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def tensors(tmp_path):
    """Two files with a matrix and a vector of every dtype."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, dtype in enumerate(STORED):
        tensors[f"matrix{number}"] = torch.randn(37, 19, generator=generator).to(dtype)
        tensors[f"vector{number}"] = torch.randn(23, generator=generator).to(dtype)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "b.safetensors")
    return tensors


def slices(tensors) -> list[TensorSlice]:
    """Of every tensor the whole, rows out of the middle, and of a matrix columns."""
    cuts = []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        cuts += [TensorSlice(name, shape, slice(0, shape[0])), TensorSlice(name, shape, slice(5, 18))]
        if tensor.ndim == 2:
            cuts += [TensorSlice(name, shape, slice(0, shape[0]), slice(3, 11))]
            cuts += [TensorSlice(name, shape, slice(7, 8), slice(18, 19))]
    return cuts


def read(folder, cuts, dtype, num_readers=1) -> list[torch.Tensor]:
    places = []
    for cut in cuts:
        shape = (cut.num_rows,) if cut.num_columns is None else (cut.num_rows, cut.num_columns)
        places.append((cut, torch.full(shape, torch.nan, dtype=dtype)))
    done: list[int] = []
    read_weights(plan_reads(places, Checkpoint(folder)), CPU, done.append, num_readers)
    assert sum(done) == sum(target.nbytes for _, target in places)
    return [target for _, target in places]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [1, 200, 2**20])
@pytest.mark.parametrize("num_readers", [1, 3])
def test_slices_are_what_indexing_gives(tensors, tmp_path, monkeypatch, dtype, limit, num_readers):
    """`limit` 1: a read is one row, whatever its size."""
    monkeypatch.setattr(weight_reader, "READ_BYTES", limit)
    monkeypatch.setattr(weight_reader, "CACHE_BYTES", limit)
    monkeypatch.setattr(weight_reader, "REPORT_BYTES", 500)
    cuts = slices(tensors)
    for cut, found in zip(cuts, read(tmp_path, cuts, dtype, num_readers), strict=True):
        rows = tensors[cut.name][cut.rows]
        expected = rows if cut.columns is None else rows[:, cut.columns]
        assert torch.equal(found, expected.to(dtype)), cut


def test_files_are_read_from_beginning_to_end_in_bounded_parts(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_reader, "READ_BYTES", 500)
    monkeypatch.setattr(weight_reader, "CACHE_BYTES", 300)
    places = [(cut, torch.empty(cut.num_rows, cut.num_columns or 1)) for cut in reversed(slices(tensors))]
    reads = plan_reads(places, Checkpoint(tmp_path))
    order = [(part.path.name, part.offset) for part in reads]
    assert order == sorted(order)
    assert {name for name, _ in order} == {"a.safetensors", "b.safetensors"}
    assert max(part.nbytes for part in reads) <= 500
    # A row of float64 has 152 bytes: what the CPU converts goes in parts of one row.
    assert max(part.nbytes for part in reads if part.dtype != torch.float32) <= 300


def test_the_number_of_threads_of_torch_is_left_as_it_was(tensors, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        read(tmp_path, slices(tensors), torch.float32, num_readers=3)
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), later) == (2, [2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_readers", [1, 4])
def test_a_file_that_became_shorter_is_named_with_the_tensor(tensors, tmp_path, num_readers):
    cuts = [cut for cut in slices(tensors) if cut.name == "matrix1"]
    checkpoint = Checkpoint(tmp_path)
    places = [(cut, torch.empty(cut.num_rows, cut.num_columns)) for cut in cuts]
    reads = plan_reads(places, checkpoint)
    path = reads[0].path
    os.truncate(path, reads[0].offset + 100)
    with pytest.raises(CheckpointError) as caught:
        read_weights(reads, CPU, lambda _: None, num_readers)
    assert str(caught.value).startswith(f"{path}: cannot read matrix1: the file ends at byte ")
    assert not [thread for thread in threading.enumerate() if thread.name == "weight-reader"]


def test_a_file_that_is_gone_is_named_with_the_tensor(tensors, tmp_path):
    cut = slices(tensors)[0]
    reads = plan_reads([(cut, torch.empty(cut.num_rows, cut.num_columns))], Checkpoint(tmp_path))
    reads[0].path.unlink()
    with pytest.raises(CheckpointError, match=rf"{reads[0].path}: cannot read {cut.name}: No such file or directory"):
        read_weights(reads, CPU, lambda _: None)


def test_an_error_of_the_listener_ends_the_readers(tensors, tmp_path):
    cut = slices(tensors)[0]
    reads = plan_reads([(cut, torch.empty(cut.num_rows, cut.num_columns))], Checkpoint(tmp_path))

    def fail(_: int) -> None:
        raise RuntimeError("nobody listens")

    with pytest.raises(RuntimeError, match="nobody listens"):
        read_weights(reads, CPU, fail)
    assert not [thread for thread in threading.enumerate() if thread.name == "weight-reader"]


def test_nothing_to_read(tmp_path):
    read_weights([], CPU, lambda _: None)


def test_reserved_memory_is_kept_until_another_buffer_has_been_filled():
    staging = Staging(CPU, capacity=4 * ALIGNMENT)
    first = [staging.reserve(ALIGNMENT + 1).fill_(1), staging.reserve(ALIGNMENT).fill_(2)]
    second = [staging.reserve(2 * ALIGNMENT).fill_(3), staging.reserve(ALIGNMENT).fill_(4)]
    assert [set(memory.tolist()) for memory in (*first, *second)] == [{1}, {2}, {3}, {4}]
    assert all(memory.data_ptr() % ALIGNMENT == first[0].data_ptr() % ALIGNMENT for memory in (*first, *second))
    third = staging.reserve(3 * ALIGNMENT)
    assert third.data_ptr() == first[0].data_ptr()
    assert NUM_BUFFERS == 2


def test_more_than_a_buffer_holds_is_a_bug():
    with pytest.raises(AssertionError):
        Staging(CPU, capacity=ALIGNMENT).reserve(ALIGNMENT + 1)


@pytest.mark.parametrize("dtype", STORED)
def test_what_is_sent_arrives_in_the_targets_dtype(dtype):
    staging = Staging(CPU, capacity=1024)
    values = torch.arange(6.0).view(2, 3)
    host = staging.reserve(6 * dtype.itemsize).view(dtype).view(2, 3).copy_(values)
    target = torch.full((2, 3), torch.nan)
    staging.send(host, target)
    staging.finish()
    assert torch.equal(target, values)
