"""A shard without a model, whose cache can tell right from wrong.

What a real cache holds at a position depends on every token up to it; here it is a hash of them. So every read through
a block table can be checked: a wrong block, a stale one, one from another prefix or a missing token does not match.
"""

from __future__ import annotations

import zlib
from array import array

from raytroupe.cluster.step import NULL_BLOCK, StepPlan, StepResult

VOCABULARY = 50


def digest(context: list[int]) -> int:
    """Stands for the keys and values at the last position of `context`."""
    return zlib.crc32(array("I", context).tobytes())


def next_token(context: list[int]) -> int:
    """The token that follows `context` in this toy language."""
    return digest(context) % VOCABULARY


def generate(prompt: list[int], max_tokens: int, stop: frozenset[int], max_model_len: int) -> list[int]:
    """What a request must answer, computed without any engine."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, max_model_len):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class SimulatedShard:
    """Executes plans exactly as the protocol in `cluster/step.py` says."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, *, self_feeding: bool) -> None:
        self.block_size = block_size
        self.self_feeding = self_feeding
        self.cache: list[int | None] = [None] * (num_blocks * block_size)
        self.tokens: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.tables: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.max_tokens_in_step = 0

    def run(self, plan: StepPlan) -> StepResult:
        """Write all rows' tokens into the cache, then read every row's context back and sample."""
        for new in plan.new:
            self.tokens[new.slot], self.tables[new.slot] = list(new.tokens), []
        for slot, blocks in plan.new_blocks:
            assert NULL_BLOCK not in blocks
            self.tables[slot].extend(blocks)
        for slot, position, tokens in plan.new_tokens:
            assert position <= len(self.tokens[slot]), "a gap in the known tokens"
            self.tokens[slot][position:] = tokens
        assert len(set(plan.slots)) == len(plan.slots), "a sequence has two rows"
        assert all(count == 1 for count in plan.counts[: plan.decode_rows])
        assert all(count > 1 for count in plan.counts[plan.decode_rows :])
        self.max_tokens_in_step = max(self.max_tokens_in_step, sum(plan.counts))
        rows = list(zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True))
        for slot, start, count, _ in rows:
            for position in range(start, start + count):
                self.cache[self._flat(slot, position)] = digest(self.tokens[slot][: position + 1])
        sampled = []
        for slot, start, count, samples in rows:
            seen = [self.cache[self._flat(slot, position)] for position in range(start + count)]
            known = self.tokens[slot][: start + count]
            assert seen == [digest(known[: end + 1]) for end in range(start + count)], f"slot {slot} sees other tokens"
            if samples:
                sampled.append(next_token(known))
                if self.self_feeding:
                    self.tokens[slot][start + count :] = [sampled[-1]]
        return StepResult(plan.step, sampled, None, 0.0, 0.0)

    def _flat(self, slot: int, position: int) -> int:
        return self.tables[slot][position // self.block_size] * self.block_size + position % self.block_size
