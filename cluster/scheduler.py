"""What runs in the next step.

There is no prefill phase and no decode phase. A request has *known* tokens and *scheduled* tokens, and every step
gives each request a share of the token budget to catch up (`cluster/sequence.py` draws it). Memory is decided here
alone: a request is admitted when the block pool can hold all its known tokens, and when a running one needs a block
that the pool does not have, the least urgent running one gives its blocks back and is computed again later.

`schedule()` and `update()` may be called in any order as long as results come in the order of the plans: several
plans can be in flight. With one pipeline stage the shards feed the token that they have just sampled, so a sequence
can be in all of them (`self_feeding`); with more stages the plans in flight hold different sequences, and the sampled
tokens go out again with the next plan.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from operator import attrgetter

import msgspec

from .errors import InvalidRequest, QueueFull
from .kv_manager import KVManager
from .request import EngineRequest, FinishReason, TokenOutput
from .request_checks import check_request
from .scheduler_stats import RequestTimes, SchedulerSnapshot, SchedulerStats
from .sequence import Sequence, Status
from .step import NewSequence, StepPlan, StepResult
from .waiting_queue import WaitingQueue

PRIORITY_SECONDS = 30.0
"""One step of priority is worth this much waiting: urgency is arrival + priority × 30 s, fixed at arrival. In time,
every request is more urgent than all that come after it: nothing starves."""

Chunk = tuple[Sequence, int, int]
"""(sequence, first position, tokens): a sequence's share of a step."""


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one replica."""

    num_blocks: int
    """Blocks in the cache, the null block included."""
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int = 1024
    pipeline_stages: int = 1
    prefix_caching: bool = True


class Scheduler:
    """Continuous batching with chunked prefill, priorities and preemption by recompute."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.kv = KVManager(config.num_blocks, config.block_size, config.prefix_caching)
        longest = self.kv.blocks_for(config.max_model_len)
        assert longest <= self.kv.pool.capacity, "the cache must hold one request of full length (cluster/kv_memory.py)"
        self.max_in_flight = max(2, config.pipeline_stages)
        self.stats = SchedulerStats()
        self._self_feeding = config.pipeline_stages == 1
        self._watermark = config.num_blocks // 100
        self._clock = clock
        self._arrivals = 0
        self._step = 0
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # by urgency
        self._by_id: dict[str, Sequence] = {}
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._in_flight: deque[tuple[int, list[Sequence]]] = deque()

    # --- requests -------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            QueueFull: `max_num_waiting` requests wait already. A request with `generated` tokens is let in all the
                same: its client has begun to read.
            InvalidRequest: the request id is in use, or as `check_request`.
        """
        limit = self.config.max_model_len
        if request.request_id in self._by_id:
            raise InvalidRequest(f"request id {request.request_id!r} is in use; give each request its own")
        check_request(request, limit)
        if len(self._waiting) >= self.config.max_num_waiting and not request.generated:
            raise QueueFull(
                f"{len(self._waiting)} requests wait already (max_num_waiting = {self.config.max_num_waiting}); "
                "try again later",
                retry_after=1,
            )
        now = self._clock()
        self._arrivals += 1
        urgency = (now + request.priority * PRIORITY_SECONDS, self._arrivals)
        sequence = Sequence(request, limit, now, urgency)
        self._by_id[request.request_id] = sequence
        self._waiting.push(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks at once; False if it is not here (any more)."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence, FinishReason.ABORT)
        return True

    @property
    def has_work(self) -> bool:
        """True if any request is not finished."""
        return bool(self._by_id)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission or readmission."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Plans without a result."""
        return len(self._in_flight)

    # --- planning -------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed now."""
        self._yield_to_urgent()
        plan = StepPlan(self._step, [], [], [], [], [], 0, [], [])
        sampling: list[Sequence] = []
        # With pipeline stages every plan in flight takes its part of the sequences, so that all stages have work: of
        # those that run now, and of as many as may run at once where new ones are taken in.
        stages, limit = self.config.pipeline_stages, self.config.max_num_seqs
        max_running_rows = limit if stages == 1 else -(-len(self._running) // stages)
        max_rows = limit if stages == 1 else -(-min(len(self._by_id), limit) // stages)
        preempted = self.stats.preemptions
        self._plan_single_tokens(plan, sampling, max_running_rows)
        budget = self.config.max_num_batched_tokens - len(plan.slots)
        chunks = self._plan_chunks(budget, max_running_rows - len(plan.slots))
        if self.stats.preemptions == preempted:  # else whoever was admitted now could be preempted in the next step
            budget -= sum(count for _, _, count in chunks)
            chunks += self._admit(plan, budget, max_rows - len(plan.slots) - len(chunks))
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
        self._step += 1
        self._in_flight.append((plan.step, sampling))
        return plan

    def _plan_single_tokens(self, plan: StepPlan, sampling: list[Sequence], max_rows: int) -> None:
        """Rows for running sequences that lack one token. The hot loop: one pass, no calls unless a block is full."""
        slots, starts, size, self_feeding = plan.slots, plan.starts, self.config.block_size, self._self_feeding
        for sequence in self._running:  # victims of a preemption leave at the end of the list, not yet visited
            start, known = sequence.scheduled, len(sequence.tokens)
            end = known + sequence.pending if self_feeding else known
            if end - start != 1 or end >= sequence.max_len:
                continue
            if len(slots) >= max_rows:
                break
            if start >= len(sequence.blocks) * size:
                block = self._grow(sequence)
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

    def _plan_chunks(self, budget: int, max_rows: int) -> list[Chunk]:
        """Shares of the budget for running sequences that lack several tokens, which they have blocks for already."""
        chunks: list[Chunk] = []
        for sequence in self._running:
            if budget <= 0 or len(chunks) >= max_rows:
                break
            missing = len(sequence.tokens) - sequence.scheduled
            if missing > 1:
                chunks.append(self._take_chunk(sequence, budget))
                budget -= chunks[-1][2]
        return chunks

    def _admit(self, plan: StepPlan, budget: int, max_rows: int) -> list[Chunk]:
        """Take waiting sequences in, in strict order of urgency, while blocks for all their known tokens are free."""
        chunks: list[Chunk] = []
        while budget > 0 and len(chunks) < max_rows and self._free_slots:
            sequence = self._waiting.head()
            if sequence is None or sequence.pending:  # a plan in flight still samples its newest token
                break
            prefix = self.kv.cached_prefix(sequence)
            if self.kv.shortage(sequence, prefix) + (self._watermark if self._running else 0) > 0:
                break
            self._waiting.remove(sequence)
            self._start(plan, sequence, prefix)
            chunks.append(self._take_chunk(sequence, budget))
            budget -= chunks[-1][2]
        return chunks

    def _take_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start = sequence.scheduled
        count = min(len(sequence.tokens) - start, budget)
        sequence.scheduled = start + count
        self.kv.register_full_blocks(sequence)  # so that equal prompts in one step share their blocks
        return sequence, start, count

    def _start(self, plan: StepPlan, sequence: Sequence, prefix: list[int]) -> None:
        """Make a waiting sequence a running one, and tell the shards all about it."""
        self.kv.admit(sequence, prefix)
        sequence.status = Status.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.sent = len(sequence.tokens)
        insort(self._running, sequence, key=attrgetter("urgency"))
        if sequence.scheduled_time is None:
            sequence.scheduled_time = self._clock()
            sequence.cached_tokens = min(sequence.scheduled, sequence.prompt_len)
            if not sequence.request.generated:  # else the replica that had it before has counted it
                self.stats.prompt_tokens += sequence.prompt_len
                if self.config.prefix_caching:
                    self.stats.prefix_queries += sequence.prompt_len
                    self.stats.prefix_hits += sequence.scheduled
        # Copies: the plan may be executed in this process while the sequence goes on.
        sampling = sequence.request.sampling
        plan.new.append(NewSequence(sequence.slot, sequence.tokens.copy(), sequence.prompt_len, sampling))
        plan.new_blocks.append((sequence.slot, sequence.blocks.copy()))

    def _send_tokens(self, plan: StepPlan, sequence: Sequence) -> None:
        """Tell all pipeline stages the tokens that the last one sampled."""
        plan.new_tokens.append((sequence.slot, sequence.sent, sequence.tokens[sequence.sent :]))
        sequence.sent = len(sequence.tokens)

    # --- memory ---------------------------------------------------------------------------------------------------

    def _grow(self, sequence: Sequence) -> int | None:
        """One more block for a running sequence, if need be from the least urgent one; None if that is itself."""
        while (block := self.kv.grow(sequence)) is None:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        return block

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self._release(victim)
        self._waiting.push(victim)
        self.stats.preemptions += 1

    def _yield_to_urgent(self) -> None:
        """Preempt running sequences for a waiting one of better priority, if that makes enough room for it."""
        head = self._waiting.head()
        if head is None or head.pending:
            return
        victims = []
        for sequence in reversed(self._running):
            if sequence.request.priority <= head.request.priority or sequence.urgency < head.urgency:
                break
            victims.append(sequence)
        if not victims:
            return
        prefix = self.kv.cached_prefix(head)
        missing = self.kv.shortage(head, prefix) + self._watermark
        if missing > self._freed_by(victims, keeping=prefix):
            return
        for victim in victims:
            if self._free_slots and self.kv.shortage(head, self.kv.cached_prefix(head)) + self._watermark <= 0:
                return
            self._preempt(victim)

    def _freed_by(self, victims: list[Sequence], keeping: list[int]) -> int:
        """Blocks outside `keeping` that nobody else holds."""
        held = Counter(block for victim in victims for block in victim.blocks)
        kept = set(keeping)
        return sum(self.kv.pool.references(block) == count for block, count in held.items() if block not in kept)

    def _release(self, sequence: Sequence) -> None:
        self.kv.release(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    # --- results --------------------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> list[TokenOutput]:
        """Take the result of the oldest plan in flight; what it means for each request, aborted ones left out."""
        step, sampling = self._in_flight.popleft()
        assert step == result.step, f"result of step {result.step} came while step {step} was due"
        now, size = self._clock(), self.config.block_size
        logprobs = result.logprobs or [None] * len(sampling)
        outputs: list[TokenOutput] = []
        for sequence, token, logprob in zip(sampling, result.tokens, logprobs, strict=True):
            if sequence.status is Status.FINISHED:
                continue
            tokens = sequence.tokens
            tokens.append(token)
            sequence.pending -= 1
            output = TokenOutput(sequence.request.request_id, [token], index=len(tokens) - 1 - sequence.prompt_len)
            if logprob is not None:
                output.logprobs = [logprob]
            if sequence.first_token_time is None:
                sequence.first_token_time = now
                output.cached_tokens = sequence.cached_tokens
            if len(tokens) >= (sequence.registered + 1) * size:
                self.kv.register_full_blocks(sequence)
            if token in sequence.stop_tokens:
                output.finish_reason = FinishReason.STOP
                output.stop_token = token
            elif len(tokens) >= sequence.max_len:
                output.finish_reason = FinishReason.LENGTH
            outputs.append(output)
            if output.finish_reason is not None:
                self._finish(sequence, output.finish_reason)
        self.stats.generated_tokens += len(outputs)
        return outputs

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = Status.FINISHED
        del self._by_id[sequence.request.request_id]
        self.stats.finished.append(RequestTimes.of(sequence, reason, self._clock()))

    # --- inspection -----------------------------------------------------------------------------------------------

    def snapshot(self) -> SchedulerSnapshot:
        """The state at this moment."""
        return SchedulerSnapshot(
            running=len(self._running),
            waiting=len(self._waiting),
            in_flight=len(self._in_flight),
            blocks_held=self.kv.pool.num_held,
            blocks_total=self.kv.pool.capacity,
            internal_waste=self.kv.internal_waste(self._running),
            prefix_queries=self.stats.prefix_queries,
            prefix_hits=self.stats.prefix_hits,
            preemptions=self.stats.preemptions,
            prompt_tokens=self.stats.prompt_tokens,
            generated_tokens=self.stats.generated_tokens,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless requests, slots and blocks agree with each other."""
        self.kv.pool.check_integrity()
        holders = Counter(block for sequence in self._running for block in sequence.blocks)
        for block in range(self.config.num_blocks):
            held = self.kv.pool.references(block)
            assert held == holders[block], f"block {block}: {held} references, in {holders[block]} block tables"
        slots = [sequence.slot for sequence in self._running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_num_seqs)), f"slots are lost or doubled: {sorted(slots)}"
        assert len(self._by_id) == len(self._running) + len(self._waiting), "a request is lost or doubled"
        assert self._running == sorted(self._running, key=attrgetter("urgency")), "running is out of order"
        for sequence in self._running:
            name = sequence.request.request_id
            assert sequence.status is Status.RUNNING, f"{name} runs with status {sequence.status}"
            assert 0 <= sequence.scheduled <= sequence.total <= sequence.max_len, f"{name}: scheduled out of range"
            assert sequence.scheduled <= len(sequence.blocks) * self.config.block_size, f"{name}: scheduled past blocks"
            assert len(sequence.blocks) <= self.kv.blocks_for(sequence.max_len), f"{name}: too many blocks"
        for sequence in self._waiting:
            name = sequence.request.request_id
            assert sequence.status is Status.WAITING, f"{name} waits with status {sequence.status}"
            assert not sequence.blocks, f"{name} waits with blocks"
            assert sequence.slot < 0, f"{name} waits with a slot"
