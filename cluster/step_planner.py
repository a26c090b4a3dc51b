"""Fills one step: single tokens of the sequences that decode first, then shares of prompts by urgency, until the token
budget is spent.

With one pipeline stage a sequence can be in all plans in flight; with more, every plan takes its part of the sequences,
so that all stages have work.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from .kv_manager import KVManager
from .pace import Pace
from .running_set import RunningSet
from .scheduler_config import SchedulerConfig
from .scheduler_stats import SchedulerStats
from .sequence import Sequence
from .step import NewSequence, StepPlan
from .waiting_queue import WaitingQueue
from .yielding import NOTHING, PromptBudget

Chunk = tuple[Sequence, int, int]
"""(sequence, first position, tokens): a sequence's share of a step."""


class StepPlanner:
    """Makes plans of what runs and what waits. Sequences count as scheduled, and their blocks are taken, when a plan is
    made."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        running: RunningSet,
        waiting: WaitingQueue,
        pace: Pace,
        stats: SchedulerStats,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._kv = kv
        self._running = running
        self._waiting = waiting
        self._pace = pace
        self._stats = stats
        self._clock = clock
        self._self_feeding = config.pipeline_stages == 1

    def plan(self, step: int, yielding_share: int, riders: int) -> tuple[StepPlan, list[Sequence]] | None:
        """The plan of a step, and the sequences that get a token by it, in the order of its rows; None if there is
        nothing to do.

        Args:
            step: its number.
            yielding_share: tokens of prompts that yield which it may compute, or `NOTHING`.
            riders: so many sequences that yield get a token all the same, if `NOTHING` yields.
        """
        visible = running = len(self._running)
        for_others = yielding_share == NOTHING
        if for_others:
            visible -= self._running.tally.yielding - riders
        plan = StepPlan(step, [], [], [], [], [], 0, [], [])
        sampling: list[Sequence] = []
        # Of those that run now, and of as many as may run at once where new ones are taken in.
        stages, limit = self._config.pipeline_stages, self._config.max_num_seqs
        max_running_rows = limit if stages == 1 else -(-running // stages)
        max_rows = limit if stages == 1 else -(-min(running + len(self._waiting), limit) // stages)
        preempted = self._stats.preemptions
        self._plan_single_tokens(plan, sampling, visible, max_running_rows)
        singles = len(plan.slots)
        # Whoever were admitted after a preemption could be preempted in the next step.
        admitted_rows = max_rows - singles if self._stats.preemptions == preempted else 0
        budget = PromptBudget(
            self._config.max_num_batched_tokens - singles,
            yielding_share,
            leaves_yielding_out=for_others and not riders,
        )
        chunks = self._plan_prompts(plan, budget, visible, max_running_rows - singles, admitted_rows)
        chunks.sort(key=lambda chunk: chunk[2] != 1)  # single tokens first; a stable sort keeps the rest in order
        for sequence, start, count in chunks:
            plan.slots.append(sequence.slot)
            plan.starts.append(start)
            plan.counts.append(count)
            plan.samples.append(start + count == len(sequence.tokens))
            if plan.samples[-1]:
                sequence.pending += 1
                sampling.append(sequence)
        if not plan.slots:
            return None
        plan.decode_rows = len(plan.counts) - sum(count != 1 for _, _, count in chunks)
        return plan, sampling

    def _plan_single_tokens(self, plan: StepPlan, sampling: list[Sequence], visible: int, max_rows: int) -> None:
        """Rows for those of the first `visible` running sequences that lack one token. The hot loop: one pass, no calls
        unless a block is full."""
        slots, starts, size, self_feeding = plan.slots, plan.starts, self._config.block_size, self._self_feeding
        # Victims of a preemption leave at the end of the list, not yet visited.
        for sequence in islice(self._running.sequences, visible):
            start, known = sequence.scheduled, len(sequence.tokens)
            end = known + sequence.pending if self_feeding else known
            if end - start != 1 or end >= sequence.max_len:
                continue
            if len(slots) >= max_rows:
                break
            if start >= len(sequence.blocks) * size:
                block = self._running.grow(sequence)
                if block is None:
                    break  # the sequence, which was the least urgent, gave way itself
                plan.new_blocks.append((sequence.slot, [block]))
            slots.append(sequence.slot)
            starts.append(start)
            sampling.append(sequence)
            sequence.scheduled = start + 1
            sequence.pending += 1
            if not self_feeding and sequence.sent < known:
                self._send_tokens(plan, sequence)
        plan.counts.extend([1] * len(slots))
        plan.samples.extend([True] * len(slots))

    def _plan_prompts(
        self, plan: StepPlan, budget: PromptBudget, visible: int, max_rows: int, max_admitted_rows: int
    ) -> list[Chunk]:
        """Shares of the budget, by urgency, for the first `visible` running sequences, which have blocks for all that
        they lack, and for waiting ones."""
        chunks: list[Chunk] = []
        if self._running.tally.lacking:
            for sequence in [member for member in islice(self._running.sequences, visible) if member.lacking]:
                self._admit(plan, budget, chunks, max_admitted_rows, before=sequence)
                share = budget.share(sequence)
                if share > 0 and len(chunks) < max_rows:
                    chunks.append(self._take_chunk(sequence, share))
                    budget.spend(sequence, chunks[-1][2])
        self._admit(plan, budget, chunks, max_admitted_rows)
        return chunks

    def _admit(
        self, plan: StepPlan, budget: PromptBudget, chunks: list[Chunk], max_rows: int, before: Sequence | None = None
    ) -> None:
        """Take waiting sequences in, in strict order of urgency, while blocks for all their known tokens are free; only
        those more urgent than `before`."""
        while len(chunks) < max_rows:
            sequence = self._waiting.head()
            if sequence is None or sequence.pending:  # a plan in flight still samples its newest token
                break
            share = budget.share(sequence)
            if share <= 0 or (before is not None and before.urgency < sequence.urgency):
                break
            prefix = self._kv.cached_prefix(sequence)
            if not self._running.fits(sequence, prefix) and budget.leaves_yielding_out:
                self._running.make_room(sequence, only_yielding=True)
                prefix = self._kv.cached_prefix(sequence)
            if not self._running.fits(sequence, prefix):
                break
            self._waiting.remove(sequence)
            self._start(plan, sequence, prefix)
            chunks.append(self._take_chunk(sequence, share))
            budget.spend(sequence, chunks[-1][2])

    def _take_chunk(self, sequence: Sequence, share: int) -> Chunk:
        start = sequence.scheduled
        missing = len(sequence.tokens) - start
        count = min(missing, share)
        sequence.scheduled = start + count
        # One token that is left is not planned here but with the single ones.
        self._running.tally.change(sequence, missing - count if missing - count > 1 else 0)
        self._kv.register_full_blocks(sequence)  # so that equal prompts in one step share their blocks
        return sequence, start, count

    def _start(self, plan: StepPlan, sequence: Sequence, prefix: list[int]) -> None:
        """Make a waiting sequence a running one, and tell the shards all about it."""
        self._running.admit(sequence, prefix)
        sequence.sent = len(sequence.tokens)
        if sequence.scheduled_time is None:
            sequence.scheduled_time = self._clock()
            self._pace.started(len(sequence.tokens), sequence.scheduled, sequence.yields, sequence.scheduled_time)
            sequence.cached_tokens = min(sequence.scheduled, sequence.prompt_len)
            if not sequence.request.generated:  # else the replica that had it before has counted it
                self._stats.prompt_tokens += sequence.prompt_len
                if self._config.prefix_caching:
                    self._stats.prefix_queries += sequence.prompt_len
                    self._stats.prefix_hits += sequence.scheduled
        # Copies: the plan may be executed in this process while the sequence goes on.
        sampling = sequence.request.sampling
        plan.new.append(NewSequence(sequence.slot, sequence.tokens.copy(), sequence.prompt_len, sampling))
        plan.new_blocks.append((sequence.slot, sequence.blocks.copy()))

    def _send_tokens(self, plan: StepPlan, sequence: Sequence) -> None:
        """Tell all pipeline stages the tokens that the last one sampled."""
        plan.new_tokens.append((sequence.slot, sequence.sent, sequence.tokens[sequence.sent :]))
        sequence.sent = len(sequence.tokens)
