"""Plans written by hand: a test says which slot computes how many tokens, and the builder keeps the books."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from raytroupe.cluster.request import SamplingParams
from raytroupe.cluster.step import NewSequence, StepPlan, StepResult


class PlanBuilder:
    """Block tables, starts and sampled tokens of a few sequences.

    With `self_feeding` plans may be built before the results of earlier ones are known, and sampled tokens are not
    sent back; otherwise every result must be given to `take` before the next step of its sequences.
    """

    def __init__(self, block_size: int, num_blocks: int, *, self_feeding: bool) -> None:
        self.block_size = block_size
        self.self_feeding = self_feeding
        self.tokens: dict[int, list[int]] = collections.defaultdict(list)
        """By slot: what was sampled since the slot's last `add`, in results that were taken."""
        self._free = collections.deque(range(1, num_blocks))
        self._blocks: dict[int, list[int]] = {}
        self._known: dict[int, int] = {}
        self._computed: dict[int, int] = {}
        self._new: list[NewSequence] = []
        self._new_tokens: list[tuple[int, int, list[int]]] = []
        self._step = 0

    def add(self, slot: int, tokens: Sequence[int], sampling: SamplingParams, prompt_len: int | None = None) -> None:
        """Give `slot` to a sequence; the blocks of its last owner are free again."""
        self._free.extend(self._blocks.pop(slot, []))
        self._blocks[slot] = []
        self._known[slot], self._computed[slot] = len(tokens), 0
        self.tokens[slot] = []
        self._new_tokens = [entry for entry in self._new_tokens if entry[0] != slot]
        self._new.append(NewSequence(slot, list(tokens), prompt_len or len(tokens), sampling))

    def step(self, counts: dict[int, int]) -> StepPlan:
        """The plan in which every slot of `counts` computes that many tokens; those that then lack none sample."""
        rows = sorted(counts.items(), key=lambda row: row[1] != 1)
        plan = StepPlan(self._step, self._new, [], [], [], [], 0, [], self._new_tokens)
        self._step, self._new, self._new_tokens = self._step + 1, [], []
        for slot, count in rows:
            start = self._computed[slot]
            end = self._computed[slot] = start + count
            assert end <= self._known[slot], f"slot {slot} has {self._known[slot]} tokens"
            missing = -(-end // self.block_size) - len(self._blocks[slot])
            if missing > 0:
                blocks = [self._free.popleft() for _ in range(missing)]
                self._blocks[slot] += blocks
                plan.new_blocks.append((slot, blocks))
            samples = end == self._known[slot]
            self._known[slot] += samples
            plan.slots.append(slot)
            plan.starts.append(start)
            plan.counts.append(count)
            plan.samples.append(samples)
            plan.decode_rows += count == 1
        return plan

    def take(self, plan: StepPlan, result: StepResult) -> None:
        """Note the tokens that a step sampled."""
        assert result.step == plan.step
        rows = zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True)
        sampled = [(slot, start + count) for slot, start, count, samples in rows if samples]
        for (slot, position), token in zip(sampled, result.tokens, strict=True):
            self.tokens[slot].append(token)
            if not self.self_feeding:
                self._new_tokens.append((slot, position, [token]))
