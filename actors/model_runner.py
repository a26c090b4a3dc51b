"""One shard's step: plan in, sampled tokens out.

plan ─▶ slot table ─▶ inputs ─▶ forward (this stage's layers) ─▶ logits of the rows that sample ─▶ tokens
           ▲                                                                                        │
           └────────────────────────────── the next step's inputs ◀─────────────────────────────────┘
"""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

from ..cluster.model_spec import ModelSpec
from ..cluster.step import StepPlan, StepResult
from ..cluster.topology import ShardLayout
from ..kernels.sampling import SampledTokens, sample
from .collectives import Collectives
from .decoder import Decoder
from .kv_cache import KVCache
from .profile_step import largest_step
from .slot_table import SlotTable
from .step_inputs import PreparedStep, SampledRows, StepInputs
from .step_reports import token_logprobs
from .warm_up import warm_up_steps


class ModelRunner:
    """Runs plans in order. Every shard of a replica gets the same plans; none may skip one."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        spec: ModelSpec,
        layout: ShardLayout,
        collectives: Collectives,
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`dtype` is that of the hidden states that pass between stages."""
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._spec = spec
        self._layout = layout
        self._collectives = collectives
        self._device, self._dtype = device, dtype
        self._largest_step = functools.partial(
            largest_step,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=block_size,
            vocab_size=spec.vocab_size,
        )
        decoder.record(kv_cache, max_num_batched_tokens, max_num_seqs)
        self._table = SlotTable(max_num_seqs, max_model_len, block_size, spec.vocab_size)
        self._inputs = StepInputs(
            self._table, block_size=block_size, max_num_batched_tokens=max_num_batched_tokens, device=device
        )

    def launch(self, plan: StepPlan) -> StepResult | None:
        """As `DeviceRunner.launch`; here nothing is left to be done afterwards."""
        return self.run(plan)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult | None:
        """Execute one step; None on every rank that is not `layout.is_output`."""
        begin = time.perf_counter()
        self._table.apply(plan)
        step = self._inputs.build(plan)
        model_begin = time.perf_counter()
        hidden = self._forward(step)
        if not self._layout.last_stage:
            return None
        sampled = self._sample(hidden, step.sampled)
        end = time.perf_counter()
        if not self._layout.is_output:
            return None
        return StepResult(plan.step, sampled.tokens, token_logprobs(sampled.logprobs), end - model_begin, end - begin)

    def warm_up(self) -> None:
        """Run a prompt and a decode step, so that the first request finds every code path loaded.

        All shards of a replica must do so together. It writes the null block only and leaves no other trace.
        """
        for plan in warm_up_steps():
            self.run(plan)
        self._table.clear()

    def profile(self) -> None:
        """Run the largest step there can be; for measuring its memory."""
        self.run(self._largest_step())
        self._table.clear()

    def _forward(self, step: PreparedStep) -> Tensor:
        """This stage's layers: [T, hidden]."""
        layout, metadata = self._layout, step.metadata
        if layout.first_stage:
            hidden = self._decoder.forward(step.tokens, None, metadata, self._kv_cache)
        else:
            shape = (len(step.tokens), self._spec.hidden_size)
            received = self._collectives.recv_hidden(torch.empty(shape, dtype=self._dtype, device=self._device))
            hidden = self._decoder.forward(None, received, metadata, self._kv_cache)
        if not layout.last_stage:
            self._collectives.send_hidden(hidden)
        return hidden

    def _sample(self, hidden: Tensor, rows: SampledRows) -> SampledTokens:
        """One token for every row that samples; every tensor-parallel rank draws the same from the same logits."""
        if not rows.slots.size:
            return SampledTokens([], None)
        batch = self._table.sampling.batch(rows.slots, rows.lengths, self._table.tokens)
        if batch is None:
            sampled = SampledTokens(self._decoder.likeliest(hidden, rows.last_tokens), None)
        else:
            sampled = sample(self._decoder.logits(hidden, rows.last_tokens), batch, self._decoder.argmax)
        self._table.record(rows.slots, rows.lengths, sampled.tokens)
        return sampled
