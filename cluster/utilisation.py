"""How much of what a replica can do is in use: what a queue does not tell as long as there is none.

A replica with one sequence is as busy as one with sixty, since it computes a step after the other either way. What is
used up is slots, blocks and *marginal* time: in a second, `prefill_token` for each token of a prompt and `decode_row`
for each token generated. The rest of a second are the `base` times of its steps, which do not grow with the work. The
longest step, of all slots and the whole token budget, has the least of them, so that marginal time can be at most

    1 − base / (base + prefill_token · B + decode_row · S)        of a second.

Two replicas of which each uses a third of this can be one that uses two thirds; that is what autoscaling asks.
"""

from __future__ import annotations

from .replica_report import ReplicaLoad, StepCurve


class UtilisationMeter:
    """Measures one replica; ask it every second or so."""

    def __init__(self) -> None:
        self._last: tuple[float, int, int] | None = None
        self._urgent_share = 0.0

    def measure(self, load: ReplicaLoad, *, computed_tokens: int, generated_tokens: int, now: float) -> float:
        """The largest of the shares of slots, blocks and time that work takes that does not yield; 0 to about 1.

        Work of class `batch` fills what is left, whatever that is, so it does not count. Blocks and time are divided
        between the classes like running sequences.

        Args:
            load: as it is now.
            computed_tokens: of prompts, since the replica started, without those that were cached.
            generated_tokens: since the replica started.
            now: seconds of any clock that does not go backwards.
        """
        if load.running:
            self._urgent_share = (load.running - load.yielding_running) / load.running
        busy = 0.0
        if load.curve is not None and self._last is not None and now > self._last[0]:
            then, computed, generated = self._last
            work = load.curve.prefill_token * (computed_tokens - computed)
            work += load.curve.decode_row * (generated_tokens - generated)
            busy = work / (now - then) / _most_work(load, load.curve)
        self._last = (now, computed_tokens, generated_tokens)
        slots = (load.running - load.yielding_running) / load.max_num_seqs
        blocks = 1 - load.free_blocks / load.total_blocks if load.running else 0.0
        return max(slots, self._urgent_share * blocks, self._urgent_share * busy)


def _most_work(load: ReplicaLoad, curve: StepCurve) -> float:
    """Share of a second that can be marginal time; 1 for a curve without slopes, which has no work to measure."""
    longest = curve.seconds(load.max_num_batched_tokens, load.max_num_seqs)
    return 1 - curve.base / longest if longest > curve.base else 1.0
