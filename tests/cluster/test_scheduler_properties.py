"""The scheduler driven through random histories against a simulated shard: right answers, bounded memory, no leaks."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_shard import SimulatedShard, generate

from raytroupe.cluster.errors import TargetUnreachable
from raytroupe.cluster.latency_class import BATCH, CLASS_NAMES, DEFAULT_TARGETS, EXPLICIT, LatencyTargets
from raytroupe.cluster.replica_report import StepCurve
from raytroupe.cluster.request import EngineRequest, FinishReason, SamplingParams
from raytroupe.cluster.scheduler import Scheduler
from raytroupe.cluster.scheduler_config import SchedulerConfig

MAX_MODEL_LEN = 40

# Few different tokens and few different beginnings, so that prefixes coincide.
prompts = st.builds(
    lambda head, tail, token: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12][:head] + tail * [token],
    st.sampled_from([0, 4, 8, 12]),
    st.integers(1, 20),
    st.integers(0, 1),
)
latencies = st.sampled_from([DEFAULT_TARGETS[name] for name in CLASS_NAMES]) | st.builds(
    LatencyTargets,
    name=st.sampled_from([BATCH, EXPLICIT]),
    ttft=st.floats(0.01, 40),
    tpot=st.sampled_from([1e-6, 0.05, 1.0]),
    refuse_late=st.booleans(),
)
additions = st.tuples(
    st.just("add"),
    prompts,
    st.integers(1, 30),
    st.integers(-1, 2),
    st.sampled_from(["", "salt"]),
    st.integers(0, 49),
    latencies,
)
curves = st.none() | st.builds(
    StepCurve, st.floats(0, 0.1), st.sampled_from([0.0, 1e-3, 0.1]), st.sampled_from([0.0, 1e-3, 0.1])
)
moves = st.sampled_from([("plan",), ("result",)])
operations = st.lists(
    st.one_of(additions, additions, moves, moves, moves, moves, st.tuples(st.just("abort"), st.integers(0, 30)))
    | st.tuples(st.just("wait"), st.floats(0, 60))
    | st.tuples(st.just("curve"), curves),
    min_size=20,
    max_size=200,
)
configs = st.builds(
    lambda block_size, spare, seqs, budget, stages, caching: SchedulerConfig(
        num_blocks=1 + MAX_MODEL_LEN // block_size + spare,
        block_size=block_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + budget,
        max_num_waiting=200,
        pipeline_stages=stages,
        prefix_caching=caching,
    ),
    st.sampled_from([4, 8]),
    st.integers(0, 5),
    st.integers(1, 6),
    st.integers(0, 30),
    st.integers(1, 3),
    st.booleans(),
)


class Engine:
    """Scheduler and shard with plans in flight, and what each request has answered so far."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(config, clock=lambda: self.now)
        self.shard = SimulatedShard(
            config.num_blocks, config.block_size, config.max_num_seqs, self_feeding=config.pipeline_stages == 1
        )
        self.results: deque = deque()
        self.expected: dict[str, list[int]] = {}
        self.answers: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}

    def add(
        self, prompt: list[int], max_tokens: int, priority: int, salt: str, stop: int, latency: LatencyTargets
    ) -> None:
        name = f"r{len(self.expected)}"
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(stop,))
        self.expected[name] = generate(prompt, max_tokens, frozenset([stop]), MAX_MODEL_LEN)
        self.answers[name] = []
        request = EngineRequest(
            request_id=name, prompt=prompt, sampling=sampling, priority=priority, cache_salt=salt, latency=latency
        )
        try:
            self.scheduler.add(request)
        except TargetUnreachable:
            assert latency.refuse_late
            self.finished[name] = FinishReason.ABORT

    def plan(self) -> bool:
        if self.scheduler.num_in_flight >= self.scheduler.max_in_flight:
            return False
        for name, error in self.scheduler.refuse_late():
            assert error.retry_after >= 1
            assert not self.answers[name], "a request was refused after it had begun to answer"
            self.finished[name] = FinishReason.ABORT
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        self.results.append(self.shard.run(plan))
        return True

    def result(self) -> bool:
        if not self.results:
            return False
        for output in self.scheduler.update(self.results.popleft()):
            assert output.request_id not in self.finished, "output after the end"
            self.answers[output.request_id] += output.tokens
            if output.finish_reason is not None:
                self.finished[output.request_id] = output.finish_reason
        return True

    def abort(self, index: int) -> None:
        name = f"r{index}"
        if self.scheduler.abort(name):
            assert name not in self.finished
            self.finished[name] = FinishReason.ABORT

    def check(self) -> None:
        self.scheduler.check_integrity()
        for name, answer in self.answers.items():
            assert answer == self.expected[name][: len(answer)], f"{name} went astray"


@settings(max_examples=400, deadline=None)
@given(configs, operations)
def test_random_histories_give_right_answers_and_leak_nothing(config, history):
    engine = Engine(config)
    for operation, *arguments in history:
        if operation == "add":
            engine.add(*arguments)
        elif operation == "abort":
            engine.abort(*arguments)
        elif operation == "plan":
            engine.plan()
        elif operation == "result":
            engine.result()
        elif operation == "wait":
            engine.now += arguments[0]
        else:
            engine.scheduler.pace.curve = arguments[0]
        engine.check()
    # No starvation and no deadlock: everything left must finish within a bounded number of steps.
    steps = 0
    while engine.scheduler.has_work or engine.results:
        moved = engine.plan()
        if not moved and (engine.results or engine.scheduler.has_work):
            assert engine.result(), "work is left and nothing can run"
        engine.check()
        steps += 1
        assert steps < 20_000, "no end in sight"
    for name, answer in engine.answers.items():
        if engine.finished[name] is not FinishReason.ABORT:
            assert answer == engine.expected[name]
    assert engine.scheduler.snapshot().blocks_held == 0
    assert engine.shard.max_tokens_in_step <= config.max_num_batched_tokens
    assert engine.scheduler.schedule() is None
