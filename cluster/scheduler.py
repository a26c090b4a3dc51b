"""What runs in the next step.

There is no prefill phase and no decode phase. A request has *known* tokens and *scheduled* tokens, and every step
gives each request a share of the token budget to catch up (`cluster/sequence.py` draws it). Memory is decided here
alone: a request is admitted when the block pool can hold all its known tokens, and when a running one needs a block
that the pool does not have, the least urgent running one gives its blocks back and is computed again later
(`cluster/running_set.py`).

The most urgent is whose first token is due first. Work of class `batch` *yields*: it comes after all other work, makes
steps that compute others' prompts hardly longer, and takes no more of a step than others' targets allow
(`cluster/pace.py`).

`schedule()` and `update()` may be called in any order as long as results come in the order of the plans: several
plans can be in flight. With one pipeline stage the shards feed the token that they have just sampled, so a sequence
can be in all of them (`self_feeding`); with more stages the plans in flight hold different sequences, and the sampled
tokens go out again with the next plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice

import msgspec

from .errors import InvalidRequest, QueueFull, TargetUnreachable
from .kv_manager import KVManager
from .late_requests import LateRequests
from .lead_time import LeadTime
from .overdue import Overdue
from .pace import Pace
from .plans_in_flight import PlansInFlight
from .queue_time import first_token_seconds, retry_seconds
from .replica_report import ReplicaLoad
from .request import EngineRequest, FinishReason, TokenOutput
from .request_checks import check_request
from .running_set import RunningSet
from .scheduler_stats import RequestTimes, SchedulerSnapshot, SchedulerStats
from .sequence import Sequence, Status
from .step import NewSequence, StepPlan, StepResult
from .waiting_queue import WaitingQueue
from .yielding import NOTHING, WAIT, PromptBudget, YieldingRules

PRIORITY_SECONDS = 30.0
"""One step of priority is worth this much waiting: a request is due at arrival + target for the first token +
priority × 30 s, fixed at arrival. In time every request is more urgent than all that come later: nothing starves."""
OVERDUE_SHARE = 8
"""One of so many slots is for work that yields and has waited longer than its target: it yields no longer."""

_EARLY = 1.25
"""Times the lead: a step whose turn comes sooner is planned at once, and not a moment later."""

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
    """Continuous batching with chunked prefill, deadlines, priorities and preemption by recompute."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.kv = KVManager(config.num_blocks, config.block_size, config.prefix_caching)
        longest = self.kv.blocks_for(config.max_model_len)
        assert longest <= self.kv.pool.capacity, "the cache must hold one request of full length (cluster/kv_memory.py)"
        self.max_in_flight = max(2, config.pipeline_stages)
        self.stats = SchedulerStats()
        self.pace = Pace()
        self.plan_at: float | None = None
        """Set when `schedule` finds that there is time left: when to call it again unless something happens before."""
        self._self_feeding = config.pipeline_stages == 1
        self._clock = clock
        self._arrivals = 0
        self._step = 0
        self._waiting = WaitingQueue()
        self._running = RunningSet(self.kv, config.max_num_seqs, config.num_blocks // 100, self._requeue)
        budget = config.max_num_batched_tokens
        self._late = LateRequests(self._running, self._waiting, self.kv, self.pace, budget)
        self._yielding = YieldingRules(
            self._running, self._waiting, self.kv, self.pace, budget, one_stage=config.pipeline_stages == 1
        )
        self._overdue = Overdue(max(1, config.max_num_seqs // OVERDUE_SHARE))
        self._by_id: dict[str, Sequence] = {}
        self._in_flight = PlansInFlight()
        self._lead = LeadTime()

    # --- requests -------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            QueueFull: `max_num_waiting` requests wait already. A request with `generated` tokens is let in all the
                same: its client has begun to read.
            TargetUnreachable: it wants to know, and its first token cannot come in time after all more urgent prompts.
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
                retry_after=self._retry_seconds(request),
            )
        now, latency = self._clock(), request.latency
        self._arrivals += 1
        due = now + latency.ttft + request.priority * PRIORITY_SECONDS
        sequence = Sequence(request, limit, now, (latency.yields, due, self._arrivals))
        if (refusal := self._late.refusal_of(sequence, now)) is not None:
            self.stats.refused_late += 1
            raise refusal
        self._by_id[request.request_id] = sequence
        if sequence.yields:
            self._overdue.add(sequence)
        self._waiting.push(sequence)
        self._late.watch(sequence)

    def _retry_seconds(self, request: EngineRequest) -> int:
        """Until a request like this one would have its turn, as predicted; at least 1."""
        return retry_seconds(first_token_seconds(self.load(), yields=request.latency.yields) or 0.0)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks at once; False if it is not here (any more)."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence, FinishReason.ABORT)
        return True

    def refuse_late(self) -> list[tuple[str, TargetUnreachable]]:
        """Forget waiting requests whose first token cannot come in time any more, if they want to know; what to tell
        their clients. Call it before every step: it costs nothing while there are none."""
        refused: list[tuple[str, TargetUnreachable]] = []
        now = self._clock() if self._late else 0.0
        while (sequence := self._late.take(now)) is not None:
            refused.append((sequence.request.request_id, self._late.refusal(sequence, now)))
            self._forget(sequence)
        self.stats.refused_late += len(refused)
        return refused

    def _requeue(self, sequence: Sequence) -> None:
        """A running sequence was preempted."""
        self.stats.preemptions += 1
        self._waiting.push(sequence)
        self._late.watch(sequence)

    def _stop_yielding(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self._running.stop_yielding(sequence)
        else:
            self._waiting.remove(sequence)
            sequence.stop_yielding()
            self._waiting.push(sequence)

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
        """The next step, or None if nothing can or should be planned now."""
        now = self._clock()
        put_off, self.plan_at = self.plan_at is not None, None
        while (overdue := self._overdue.take(now)) is not None:
            self._stop_yielding(overdue)
        head = self._waiting.head()
        if head is not None and not head.pending:
            self._running.make_room(head)
        remaining = self._in_flight.remaining(now)
        # At most half a step, so that there is always something to learn from.
        lead = min(self._lead.seconds, self._in_flight.newest_seconds / 2)
        early = remaining > _EARLY * lead
        yielding_share = self._yielding.share(remaining, early, now)
        if yielding_share == WAIT:
            self.plan_at = now + remaining - lead
            return None
        visible = running = len(self._running)
        for_others = yielding_share == NOTHING
        riders = self._yielding.riders() if for_others else 0
        if for_others:
            visible -= self._running.tally.yielding - riders
        plan = StepPlan(self._step, [], [], [], [], [], 0, [], [])
        sampling: list[Sequence] = []
        # With pipeline stages every plan in flight takes its part of the sequences, so that all stages have work: of
        # those that run now, and of as many as may run at once where new ones are taken in.
        stages, limit = self.config.pipeline_stages, self.config.max_num_seqs
        max_running_rows = limit if stages == 1 else -(-running // stages)
        max_rows = limit if stages == 1 else -(-min(len(self._by_id), limit) // stages)
        preempted = self.stats.preemptions
        self._plan_single_tokens(plan, sampling, visible, max_running_rows)
        singles = len(plan.slots)
        # Whoever were admitted after a preemption could be preempted in the next step.
        admitted_rows = max_rows - singles if self.stats.preemptions == preempted else 0
        budget = PromptBudget(
            self.config.max_num_batched_tokens - singles,
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
        prefill_tokens = sum(plan.counts[plan.decode_rows :])
        seconds = self.pace.step_seconds(prefill_tokens, plan.decode_rows)
        self._in_flight.add(plan.step, sampling, prefill_tokens, seconds, now, put_off=put_off)
        self._step += 1
        return plan

    def _plan_single_tokens(self, plan: StepPlan, sampling: list[Sequence], visible: int, max_rows: int) -> None:
        """Rows for those of the first `visible` running sequences that lack one token. The hot loop: one pass, no calls
        unless a block is full."""
        slots, starts, size, self_feeding = plan.slots, plan.starts, self.config.block_size, self._self_feeding
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
            prefix = self.kv.cached_prefix(sequence)
            if not self._running.fits(sequence, prefix) and budget.leaves_yielding_out:
                self._running.make_room(sequence, only_yielding=True)
                prefix = self.kv.cached_prefix(sequence)
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
        self.kv.register_full_blocks(sequence)  # so that equal prompts in one step share their blocks
        return sequence, start, count

    def _start(self, plan: StepPlan, sequence: Sequence, prefix: list[int]) -> None:
        """Make a waiting sequence a running one, and tell the shards all about it."""
        self._running.admit(sequence, prefix)
        sequence.sent = len(sequence.tokens)
        if sequence.scheduled_time is None:
            sequence.scheduled_time = self._clock()
            self.pace.started(len(sequence.tokens), sequence.scheduled, sequence.yields, sequence.scheduled_time)
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

    # --- results --------------------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> list[TokenOutput]:
        """Take the result of the oldest plan in flight; what it means for each request, aborted ones left out."""
        now, size = self._clock(), self.config.block_size
        sampling = self._in_flight.pop(result.step, now)
        if self.plan_at is not None:
            self._lead.observe(0.0)
        elif (made := self._in_flight.put_off_until) is not None:
            self._lead.observe(now - made)
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
        now = self._clock()
        self._forget(sequence)
        self.stats.finished.append(RequestTimes.of(sequence, reason, now))
        if reason is not FinishReason.ABORT and sequence.scheduled_time is not None:
            self.pace.finished(now - sequence.scheduled_time)

    def _forget(self, sequence: Sequence) -> None:
        (self._running if sequence.status is Status.RUNNING else self._waiting).remove(sequence)
        sequence.status = Status.FINISHED
        self._overdue.discard(sequence)
        del self._by_id[sequence.request.request_id]

    # --- inspection -----------------------------------------------------------------------------------------------

    def snapshot(self) -> SchedulerSnapshot:
        """The state at this moment."""
        return SchedulerSnapshot(
            running=len(self._running),
            waiting=len(self._waiting),
            in_flight=len(self._in_flight),
            blocks_held=self.kv.pool.num_held,
            blocks_total=self.kv.pool.capacity,
            internal_waste=self.kv.internal_waste(self._running.sequences),
            prefix_queries=self.stats.prefix_queries,
            prefix_hits=self.stats.prefix_hits,
            preemptions=self.stats.preemptions,
            refused_late=self.stats.refused_late,
            prompt_tokens=self.stats.prompt_tokens,
            generated_tokens=self.stats.generated_tokens,
        )

    def load(self) -> ReplicaLoad:
        """What routers are told; cheap enough for every step."""
        running, waiting = self._running.tally, self._waiting.tally
        share = self.pace.uncached_share
        in_flight = self._in_flight.prefill_tokens(self._clock())  # they go first, whoever they are of
        return ReplicaLoad(
            running=running.sequences,
            yielding_running=running.yielding,
            waiting=waiting.sequences,
            yielding_waiting=waiting.yielding,
            prefill_tokens=in_flight + running.lacking + round(share * waiting.lacking),
            yielding_prefill_tokens=running.yielding_lacking + round(share * waiting.yielding_lacking),
            free_blocks=self.kv.pool.num_unheld,
            total_blocks=self.kv.pool.capacity,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            curve=self.pace.curve,
            residence=self.pace.residence,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless requests, slots, blocks and counts agree with each other."""
        self.kv.pool.check_integrity()
        self._running.check_integrity()
        self._waiting.check_integrity()
        assert len(self._by_id) == len(self._running) + len(self._waiting), "a request is lost or doubled"
        yielding = self._running.tally.yielding + self._waiting.tally.yielding
        assert yielding == len(self._overdue), f"{yielding} sequences yield, {len(self._overdue)} are watched"
