"""One shard's step on a GPU: launched without waiting for the device, its tokens fed to the next step where they are.

plan ─▶ tables ─▶ prepare ─▶ layers ─▶ logits ─▶ sample ─▶ record ──▶ copied to the host, one step late
          ▲                                                   │
          └──────────── the device's own token table ◀────────┘

The host knows lengths, blocks and sampling parameters, which is all that a plan needs; token ids are on the device.
`ModelRunner` does the same step by step, with everything on the host.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cluster.model_spec import ModelSpec
from ..cluster.step import StepPlan, StepResult
from ..cluster.topology import ShardLayout
from ..kernels.attention_metadata import AttentionMetadata
from ..kernels.gpu.paged_attention import AttentionShape
from ..kernels.gpu.sampling import DeviceSampler, DeviceSamples
from ..kernels.gpu.step import NO_SLOT, prepare, record
from ..kernels.gpu.triton_kernels import TritonKernels
from ..kernels.uploads import Uploads
from .collectives import Collectives
from .decode_graphs import DecodeGraphs, graph_sizes, pad_rows
from .decoder import Decoder
from .device_tables import DeviceTables
from .kv_cache import KVCache
from .pending_step import HostCopies, PendingStep, StepClock
from .profile_step import largest_step
from .step_reports import token_logprobs
from .warm_up import batch_sizes, long_chunk, warm_up_steps

_PADDING = np.array([NO_SLOT, 0, 1, 0, -1, 0, 0, 0], dtype=np.int32)


class DeviceRunner:
    """Runs plans in order. Every shard of a replica gets the same plans; none may skip one."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        spec: ModelSpec,
        layout: ShardLayout,
        collectives: Collectives,
        kernels: TritonKernels,
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`kernels` are those of the decoder; `dtype` is that of the hidden states that pass between stages."""
        self._decoder, self._kv_cache, self._kernels = decoder, kv_cache, kernels
        self._spec, self._layout, self._collectives = spec, layout, collectives
        self._block_size, self._max_model_len, self._max_tokens = block_size, max_model_len, max_num_batched_tokens
        self._device = device
        self._graph_sizes = graph_sizes(min(max_num_seqs, max_num_batched_tokens))
        self._largest_step = functools.partial(
            largest_step,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            vocab_size=spec.vocab_size,
        )
        self._tables = DeviceTables(max_num_seqs, max_model_len, block_size, spec.vocab_size, device)
        self._shape = AttentionShape(layout.num_heads(spec), layout.num_kv_heads(spec), spec.head_dim)
        layers = [spec.layers[index] for index in layout.layers(spec)]
        self._windows = sorted({layer.window for layer in layers}, key=lambda window: window or 0)
        self._tokens, self._positions, self._slots = (
            torch.zeros(max_num_batched_tokens, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._received = torch.empty(
            0 if layout.first_stage else max_num_batched_tokens, spec.hidden_size, dtype=dtype, device=device
        )
        self._uploads, self._place_uploads, self._sample_uploads = Uploads(device), Uploads(device), Uploads(device)
        self._sampler = DeviceSampler(spec.vocab_size, max_num_seqs, device) if layout.last_stage else None
        self._clock = StepClock(device)
        self._nothing = torch.empty(0, dtype=torch.int32, device=device)
        self._copies = HostCopies(device, max_num_seqs, steps=max(2, layout.pp_size) + 1)
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep | None:
        """Launch one step; None on every rank that is not `layout.is_output`."""
        timer = self._clock.start()
        growth = self._tables.apply(plan)
        counts = np.array(plan.counts, dtype=np.int64)
        starts = np.array(plan.starts, dtype=np.int64)
        slots = np.array(plan.slots, dtype=np.int64)
        ends = np.cumsum(counts)
        rows = np.zeros((len(slots), len(_PADDING)), dtype=np.int32)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = slots, starts, counts, ends - counts
        rows[:, 4] = [growth.get(slot, -1) for slot in plan.slots] if growth else -1
        timer.begin()
        hidden, uploaded = self._forward(rows, counts, starts + counts, plan.decode_rows)
        if not self._layout.last_stage:
            return None
        samples: DeviceSamples | None = None
        if any(plan.samples):
            sampled = np.flatnonzero(np.array(plan.samples, dtype=np.bool_))
            lengths = (starts + counts)[sampled]
            if len(sampled) == len(hidden):  # every token is a row that samples
                samples = self._sample(hidden, None, uploaded["rows"], slots, lengths)
            else:
                chosen = self._place_uploads({"last tokens": ends[sampled] - 1, "rows": rows[sampled]})
                samples = self._sample(hidden, chosen["last tokens"], chosen["rows"], slots[sampled], lengths)
        if not self._layout.is_output:
            return None
        copies = None if samples is None else samples.map(self._copies.start)
        timer.end()

        def finish(model_seconds: float, total_seconds: float) -> StepResult:
            if copies is None:
                return StepResult(plan.step, [], None, model_seconds, total_seconds)
            logprobs = token_logprobs(copies.reports())
            return StepResult(plan.step, copies.tokens.tolist(), logprobs, model_seconds, total_seconds)

        return PendingStep(timer, finish)

    def run(self, plan: StepPlan) -> StepResult | None:
        """Launch a step and wait for its result."""
        pending = self.launch(plan)
        return None if pending is None else pending.result()

    def warm_up(self, *, record: bool = True) -> None:
        """Run prompts and decode steps, greedy and with every option, and record the graphs, so that the first request
        finds every kernel compiled. All shards of a replica must do so together; it writes the null block only.

        Args:
            record: False compiles only.
        """
        chunk = long_chunk(self._max_model_len, self._block_size)
        sized = [self._largest_step(max_num_batched_tokens=size) for size in batch_sizes(self._max_tokens)]
        for plan in (*warm_up_steps(), chunk, *sized):
            self.run(plan)
        if record:
            self._record_graphs()
            for plan in warm_up_steps():
                self.run(plan)
        self._tables.clear()

    def profile(self) -> None:
        """Run the largest step there can be; for measuring its memory."""
        self.run(self._largest_step(max_num_batched_tokens=self._max_tokens))
        self._tables.clear()

    # --- the model's part -----------------------------------------------------------------------------------------

    def _forward(
        self, rows: NDArray[np.int32], counts: NDArray[np.int64], contexts: NDArray[np.int64], decode_rows: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This stage's layers: [T, hidden], which have been sent on if there is a next stage; and what was uploaded."""
        tokens = int(counts.sum())
        if not self._layout.first_stage:
            self._collectives.recv_hidden(self._received[:tokens])
        size = self._graphs.fitting(tokens) if self._graphs is not None and decode_rows == len(rows) else None
        if size is not None and self._graphs is not None:
            hidden, uploaded = self._graphs.run(size, self._decode_inputs(size, rows, contexts))
            hidden = hidden[:tokens]
        else:
            work = self._kernels.attend.host_work(
                self._shape, self._windows, counts, contexts, rows[:, 0].astype(np.int64), decode_rows
            )
            uploaded = self._uploads({"rows": rows, **work})
            hidden = self._compute(uploaded, tokens, int(counts.max()), decode_rows)
        if not self._layout.last_stage:
            self._collectives.send_hidden(hidden)
        return hidden, uploaded

    def _compute(self, uploaded: dict[str, Tensor], tokens: int, longest: int, decode_rows: int) -> Tensor:
        """Everything behind the upload, without a look at the host."""
        ids, positions, slots = self._tokens[:tokens], self._positions[:tokens], self._slots[:tokens]
        rows, tables = uploaded["rows"], self._tables
        prepare(rows, tables.tokens, tables.block_tables, longest, self._block_size, (ids, positions, slots))
        metadata = AttentionMetadata(
            positions=positions,
            slot_mapping=slots,
            query_start=self._nothing,
            context_lens=self._nothing,
            block_tables=tables.block_tables,
            decode_rows=decode_rows,
            counts=[],
            contexts=[],
            work=self._kernels.attend.step_work(uploaded, self._windows),
        )
        if self._layout.first_stage:
            return self._decoder.forward(ids, None, metadata, self._kv_cache)
        return self._decoder.forward(None, self._received[:tokens], metadata, self._kv_cache)

    def _decode_inputs(
        self, size: int, rows: NDArray[np.int32], contexts: NDArray[np.int64]
    ) -> dict[str, NDArray[np.int32]]:
        """Inputs of a recorded step of `size` rows. Those that pad it look at one key, anybody's: what they compute is
        thrown away, but should be numbers."""
        padded = pad_rows(rows, size, _PADDING)
        seen = np.ones(size, dtype=np.int64)
        seen[: len(contexts)] = contexts
        tables = np.maximum(padded[:, 0], 0).astype(np.int64)
        one = np.ones(size, dtype=np.int64)
        work = self._kernels.attend.host_work(self._shape, self._windows, one, seen, tables, size, padded_rows=size)
        return {"rows": padded, **work}

    @torch.inference_mode()
    def _record_graphs(self) -> None:
        """For all batch sizes; rows of the recording are padding, which reads and writes the null block."""

        def example(size: int) -> dict[str, NDArray[np.int32]]:
            return self._decode_inputs(size, _PADDING[None][:0], np.zeros(0, dtype=np.int64))

        def compute(size: int, inputs: dict[str, Tensor]) -> Tensor:
            return self._compute(inputs, size, 1, size)

        self._graphs = DecodeGraphs(self._graph_sizes, example, compute, self._device)

    # --- the sampler's part ---------------------------------------------------------------------------------------

    def _sample(
        self,
        hidden: Tensor,
        last_tokens: Tensor | None,
        rows: Tensor,
        slots: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> DeviceSamples:
        """One token for every row that samples; every tensor-parallel rank draws the same from the same logits.

        Args:
            last_tokens: [S] int64, index of each row's last token; None: all tokens are.
            rows: [at least S, 8], as uploaded.
        """
        assert self._sampler is not None
        batch = self._tables.sampling.device_batch(slots, lengths)
        logits = self._decoder.logits(hidden, last_tokens)
        samples = self._sampler.sample(logits, batch, self._tables.tokens, self._sample_uploads)
        record(self._tables.tokens, rows, samples.tokens)
        return samples
