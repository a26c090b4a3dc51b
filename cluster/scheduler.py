"""What runs in the next step.

There is no prefill phase and no decode phase. A request has *known* tokens and *scheduled* tokens, and every step
gives each request a share of the token budget to catch up (`cluster/sequence.py` draws it, `cluster/step_planner.py`
does it). Memory is decided here alone: a request is admitted when the block pool can hold all its known tokens, and
when a running one needs a block that the pool does not have, the least urgent running one gives its blocks back and is
computed again later (`cluster/running_set.py`).

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
from .scheduler_config import SchedulerConfig
from .scheduler_stats import RequestTimes, SchedulerSnapshot, SchedulerStats
from .sequence import Sequence, Status
from .step import StepPlan, StepResult
from .step_planner import StepPlanner
from .waiting_queue import WaitingQueue
from .yielding import NOTHING, WAIT, YieldingRules

PRIORITY_SECONDS = 30.0
"""One step of priority is worth this much waiting: a request is due at arrival + target for the first token +
priority × 30 s, fixed at arrival. In time every request is more urgent than all that come later: nothing starves."""
OVERDUE_SHARE = 8
"""One of so many slots is for work that yields and has waited longer than its target: it yields no longer."""

_EARLY = 1.25
"""Times the lead: a step whose turn comes sooner is planned at once, and not a moment later."""


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
        self._planner = StepPlanner(config, self.kv, self._running, self._waiting, self.pace, self.stats, clock)
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
        riders = self._yielding.riders() if yielding_share == NOTHING else 0
        planned = self._planner.plan(self._step, yielding_share, riders)
        if planned is None:
            return None
        plan, sampling = planned
        prefill_tokens = sum(plan.counts[plan.decode_rows :])
        seconds = self.pace.step_seconds(prefill_tokens, plan.decode_rows)
        self._in_flight.add(plan.step, sampling, prefill_tokens, seconds, now, put_off=put_off)
        self._step += 1
        return plan

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
