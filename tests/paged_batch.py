"""Steps of a paged cache written by hand, for tests of kernels and decoder: no scheduler, no runner."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raytroupe.actors.collectives import Collectives, SingleShard, connect
from raytroupe.actors.decoder import Decoder
from raytroupe.actors.kv_cache import KVCache
from raytroupe.actors.weights import load_weights
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.topology import ShardLayout
from raytroupe.kernels import native_library
from raytroupe.kernels.attention_metadata import AttentionMetadata
from raytroupe.kernels.gpu.triton_kernels import TritonKernels
from raytroupe.kernels.interface import Kernels
from raytroupe.kernels.native_kernels import NativeKernels
from raytroupe.kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")
WAYS = ("torch", "native", "recorded", "recorded around the library's products")
"""How a decoder's layers can run on a CPU: in torch, in compiled kernels one by one, or in these as one program, which
may leave the products to torch. "triton" are the kernels of a GPU, under the interpreter."""
MAX_TOKENS = 160
"""Of a step of a recorded decoder."""
MAX_SAMPLES = 4
"""Rows of a step whose logits a recorded decoder computes at once."""


def kernels_for(way: str, dtype: torch.dtype) -> Kernels:
    """Fresh kernels for one of `WAYS` or "triton"; skips the test if they were not compiled."""
    if way == "torch":
        return TorchKernels(CPU, dtype)
    if way == "triton":
        return TritonKernels(CPU, dtype)
    if not native_library.is_built():
        pytest.skip("the kernels were not compiled: there was no C++ compiler at installation")
    return NativeKernels(dtype, compiled_products="library" not in way)


@dataclasses.dataclass
class BlockTables:
    """Shuffled block ids for sequences numbered from 0; block 0 belongs to none."""

    block_size: int
    num_blocks: int
    tables: list[list[int]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = list(range(1, self.num_blocks))
        random.Random(7).shuffle(self._free)

    def metadata(self, rows: list[tuple[int, int, int]]) -> AttentionMetadata:
        """Describe rows (sequence, first position, number of tokens), rows of one token first."""
        counts = [count for _, _, count in rows]
        assert counts == sorted(counts, key=lambda count: count != 1)
        contexts = [start + count for _, start, count in rows]
        positions, slots = [], []
        for sequence, start, count in rows:
            table = self._grown(sequence, start + count)
            positions += range(start, start + count)
            slots += [
                table[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, start + count)
            ]
        width = max(-(-context // self.block_size) for context in contexts)
        padded = [(self.tables[sequence] + [0] * width)[:width] for sequence, _, _ in rows]
        return AttentionMetadata(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_start=torch.tensor([0, *counts]).cumsum(0).int(),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.tensor(padded, dtype=torch.int32),
            decode_rows=sum(count == 1 for count in counts),
            counts=counts,
            contexts=contexts,
        )

    def _grown(self, sequence: int, length: int) -> list[int]:
        while len(self.tables) <= sequence:
            self.tables.append([])
        table = self.tables[sequence]
        while len(table) * self.block_size < length:
            table.append(self._free.pop())
        return table


class Stage:
    """One loaded shard with its cache."""

    def __init__(
        self,
        folder: Path,
        layout: ShardLayout,
        collectives: Collectives,
        max_model_len: int = 512,
        dtype: torch.dtype = torch.float32,
        way: str = "recorded",
        stored: torch.dtype | None = None,
    ) -> None:
        self.spec, self.layout = load_spec(folder), layout
        weights = load_weights(folder, self.spec, layout, dtype, CPU)
        kernels = kernels_for(way, dtype)
        self.decoder = Decoder(self.spec, layout, weights, kernels, collectives, max_model_len, dtype, CPU)
        self.cache = KVCache(self.spec, layout, 128, 8, stored or dtype, CPU)
        if way.startswith("recorded"):
            self.decoder.record(self.cache, MAX_TOKENS, MAX_SAMPLES)


class DecoderDriver:
    """A decoder on one shard that is fed rows of known sequences and keeps the logits of every position."""

    def __init__(
        self,
        folder: Path,
        sequences: list[list[int]],
        max_model_len: int = 512,
        dtype: torch.dtype = torch.float32,
        way: str = "recorded",
        stored: torch.dtype | None = None,
    ) -> None:
        """`way` is one of `WAYS`; `stored` what the cache holds, if not `dtype`."""
        self.stage = Stage(folder, ShardLayout(), SingleShard(), max_model_len, dtype, way, stored)
        self.sequences = sequences
        self.blocks = BlockTables(block_size=8, num_blocks=128)
        self.logits: list[list[Tensor]] = [[] for _ in sequences]

    def step(self, counts: dict[int, int]) -> None:
        """Compute the next `counts[i]` tokens of sequence i."""
        order = sorted(counts, key=lambda i: counts[i] != 1)
        rows = [(i, len(self.logits[i]), counts[i]) for i in order]
        tokens = [token for i, start, count in rows for token in self.sequences[i][start : start + count]]
        metadata = self.blocks.metadata(rows)
        hidden = self.stage.decoder.forward(torch.tensor(tokens), None, metadata, self.stage.cache)
        logits = self.stage.decoder.logits(hidden).clone()
        for (i, _, _), part in zip(rows, logits.split(metadata.counts), strict=True):
            self.logits[i] += list(part)

    def all_logits(self, sequence: int) -> Tensor:
        """[positions computed, vocab]."""
        return torch.stack(self.logits[sequence])


def run_shard(
    folder: Path,
    layout: ShardLayout,
    collectives: Collectives,
    sequences: list[list[int]],
    steps: list[list[tuple]],
    way: str = "recorded",
) -> list[Tensor]:
    """Run steps, each a list of rows as in `BlockTables.metadata`, on one shard of a replica in one of `WAYS`.

    Returns:
        On last stages, for every step the logits of each row's last token; else nothing.
    """
    stage = Stage(folder, layout, collectives, way=way)
    blocks = BlockTables(block_size=8, num_blocks=128)
    results = []
    for rows in steps:
        metadata = blocks.metadata(rows)
        tokens = torch.tensor([t for i, start, count in rows for t in sequences[i][start : start + count]])
        if layout.first_stage:
            hidden = stage.decoder.forward(tokens, None, metadata, stage.cache)
        else:
            received = collectives.recv_hidden(torch.empty(len(tokens), stage.spec.hidden_size))
            hidden = stage.decoder.forward(None, received, metadata, stage.cache)
        if layout.last_stage:
            results.append(stage.decoder.logits(hidden[metadata.query_start[1:].long() - 1]).clone())
        else:
            collectives.send_hidden(hidden)
    return results


def run_over_gloo(
    folders: list[Path], layout: ShardLayout, init_method: str, sequences: list, steps: list
) -> list[list]:
    """`run_shard` for several models in a process of a gloo world; logits as numpy, which pickles."""
    torch.set_num_threads(1)
    collectives = connect(layout, init_method, 60.0, CPU)
    results = [run_shard(folder, layout, collectives, sequences, steps) for folder in folders]
    torch.distributed.barrier()  # a shard that leaves early fails those that still talk to it
    collectives.close()
    return [[logits.numpy() for logits in model] for model in results]


def random_sequences(lengths: list[int], vocab_size: int) -> list[list[int]]:
    """Token ids above the special ones."""
    generator = random.Random(3)
    return [[generator.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
