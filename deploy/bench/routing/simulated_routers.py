"""The routers that are compared in simulated time: ours, and what stands for the others."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from ....cluster.block_hash import short_block_hashes
from ....cluster.messages import ModelCard
from ....cluster.replica_report import ReplicaLoad
from ....cluster.request import EngineRequest
from ....cluster.router_config import RouterConfig
from ....cluster.scheduler_config import SchedulerConfig
from ....router.router import Router
from .routers import OURS

MODEL = "simulated"
Clock = Callable[[], float]


class Ours:
    """The router of an ingress, fed with the replicas' reports."""

    def __init__(self, replicas: int, config: SchedulerConfig, clock: Clock) -> None:
        card = ModelCard(
            name=MODEL,
            path="",
            max_model_len=config.max_model_len,
            vocab_size=0,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_waiting=config.max_num_waiting,
        )
        self._names = [f"replica-{index}" for index in range(replicas)]
        self._index_of = {name: index for index, name in enumerate(self._names)}
        blocks = replicas * config.num_blocks
        self.router = Router([card], RouterConfig(index_blocks=blocks), clock=clock)
        self.router.set_replicas(MODEL, self._names)
        self.decision_seconds: list[float] = []

    def choose(self, request: EngineRequest) -> int:
        began = time.perf_counter()
        decision = self.router.place(MODEL, request)
        self.router.reserve(request.request_id, decision, request.latency)
        self.decision_seconds.append(time.perf_counter() - began)
        assert decision.replica is not None, "all replicas are known from the beginning"
        return self._index_of[decision.replica]

    def arrived(self, request_id: str, replica: int) -> None:
        pass  # the report says so

    def started(self, request_id: str) -> None:
        self.router.started(request_id)

    def ended(self, request_id: str, replica: int) -> None:
        self.router.release(request_id)

    def report(
        self, replica: int, load: ReplicaLoad, stored: list[int], evicted: list[int], accepted: list[str]
    ) -> None:
        name = self._names[replica]
        self.router.index.stored(name, stored)
        self.router.index.evicted(name, evicted)
        self.router.fleet.report(name, load, accepted)


class _Deaf:
    """Routers that know only what they have sent themselves."""

    def __init__(self, replicas: int, config: SchedulerConfig, clock: Clock) -> None:
        self.ongoing = [0] * replicas
        self.block_size = config.block_size
        self.rng = random.Random(0)
        self.decision_seconds: list[float] = []
        self.next = 0

    def arrived(self, request_id: str, replica: int) -> None:
        pass

    def started(self, request_id: str) -> None:
        pass

    def ended(self, request_id: str, replica: int) -> None:
        self.ongoing[replica] -= 1

    def report(
        self, replica: int, load: ReplicaLoad, stored: list[int], evicted: list[int], accepted: list[str]
    ) -> None:
        pass

    def choose(self, request: EngineRequest) -> int:
        index = self.pick(request)
        self.ongoing[index] += 1
        return index

    def pick(self, request: EngineRequest) -> int:
        raise NotImplementedError

    def less_loaded_of_two(self) -> int:
        if len(self.ongoing) == 1:
            return 0
        return min(self.rng.sample(range(len(self.ongoing)), 2), key=self.ongoing.__getitem__)


class RoundRobin(_Deaf):
    """One after the other."""

    def pick(self, request: EngineRequest) -> int:
        self.next = (self.next + 1) % len(self.ongoing)
        return self.next


class PowerOfTwo(_Deaf):
    """The one with fewer ongoing requests of two at random."""

    def pick(self, request: EngineRequest) -> int:
        return self.less_loaded_of_two()


class LongestMatch(_Deaf):
    """Where the longest beginning of the prompt was sent before; if that is less than a tenth of it, where the fewest
    blocks were sent. Nothing is ever forgotten, as nobody says what was evicted."""

    def __init__(self, replicas: int, config: SchedulerConfig, clock: Clock) -> None:
        super().__init__(replicas, config, clock)
        self._sent: list[set[int]] = [set() for _ in range(replicas)]

    def pick(self, request: EngineRequest) -> int:
        hashes = short_block_hashes(request.prompt, self.block_size, "")
        matched = [self._matched(known, hashes) for known in self._sent]
        best = max(matched)
        if 10 * best < len(hashes):
            index = min(range(len(self._sent)), key=lambda replica: len(self._sent[replica]))
        else:
            index = self.rng.choice([replica for replica, count in enumerate(matched) if count == best])
        self._sent[index].update(hashes)
        return index

    @staticmethod
    def _matched(known: set[int], hashes: list[int]) -> int:
        return next((count for count, content in enumerate(hashes) if content not in known), len(hashes))


CHOOSERS: dict[str, type[Ours] | type[_Deaf]] = {
    OURS: Ours,
    "round-robin": RoundRobin,
    "power-of-two": PowerOfTwo,
    "longest-match": LongestMatch,
}
