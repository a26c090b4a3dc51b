"""Interactive requests beside a batch load without end, in simulated time, which is exact."""

from __future__ import annotations

import pytest
from simulated_time import SimulatedReplica, poisson, requests

from raytroupe.cluster.latency_class import BATCH, INTERACTIVE
from raytroupe.cluster.replica_report import StepCurve
from raytroupe.cluster.scheduler_config import SchedulerConfig
from raytroupe.cluster.scheduler_stats import RequestTimes

SECONDS = 120.0
LIKE_A_CPU = StepCurve(base=4e-3, prefill_token=1.5e-4, decode_row=2e-4)


def run(interactive_rate: float, *, batch: bool, batch_prompts: tuple[int, int]) -> dict[str, list[RequestTimes]]:
    """What finished, by class."""
    limits = SchedulerConfig(
        num_blocks=4001, block_size=16, max_model_len=4096, max_num_seqs=32, max_num_batched_tokens=2048
    )
    replica = SimulatedReplica(LIKE_A_CPU, limits, gap=5e-4)
    arrivals = poisson(requests(INTERACTIVE, (64, 256), (16, 48)), interactive_rate) if interactive_rate else iter(())
    replica.run(arrivals, requests(BATCH, batch_prompts, (32, 96)) if batch else iter(()), SECONDS)
    replica.scheduler.check_integrity()
    return {kind: [times for times in replica.finished if times.latency_class == kind] for kind in (INTERACTIVE, BATCH)}


def p99_first_token(finished: list[RequestTimes]) -> float:
    seconds = sorted(times.first_token for times in finished if times.first_token is not None)
    return seconds[int(0.99 * len(seconds))]


def tokens(finished: list[RequestTimes]) -> int:
    return sum(times.prompt_tokens + times.generated_tokens for times in finished)


@pytest.mark.parametrize("batch_prompts", [(100, 400), (300, 900)])
def test_interactive_stays_quick_and_batch_keeps_its_throughput(batch_prompts):
    rate = 3.5
    alone = run(rate, batch=False, batch_prompts=batch_prompts)[INTERACTIVE]
    batch_alone = run(0.0, batch=True, batch_prompts=batch_prompts)[BATCH]
    both = run(rate, batch=True, batch_prompts=batch_prompts)
    share = tokens(both[INTERACTIVE]) / tokens(batch_alone)
    assert 0.1 < share < 0.15, "the share of the capacity that interactive takes"
    assert p99_first_token(both[INTERACTIVE]) <= 1.3 * p99_first_token(alone)
    assert tokens(both[BATCH]) >= 0.8 * tokens(batch_alone)
    assert all(times.within_target for times in both[INTERACTIVE])
