"""What shards of a replica tell each other in tensors: sums and concatenations within a stage, hidden states between.

All pp * tp shards form one torch.distributed world. Each stage is a group of its own; shard (p, t) hands its hidden
states to (p + 1, t).
"""

from __future__ import annotations

import contextlib
from collections import deque
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..cluster.errors import EngineError
from ..cluster.topology import ShardLayout

CLOSE_TIMEOUT = timedelta(seconds=2)
"""How long a closing shard waits for a peer to take what was sent to it."""


class Collectives(Protocol):
    """The tensor communication that a decoder and its runner need."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the stage's shards; in place, and returned."""

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        """Concatenate the stage's shards' [S, n] to [S, tp * n], in rank order."""

    def send_hidden(self, hidden: Tensor) -> None:
        """Hand [T, hidden] to the next stage. Returns at once; the tensor must not be changed afterwards."""

    def recv_hidden(self, into: Tensor) -> Tensor:
        """Wait for the stage before to fill `into` [T, hidden], and return it."""

    def close(self) -> None:
        """Leave the group; peers that wait for this shard fail."""


class SingleShard:
    """A replica of one shard: nothing to tell anybody, and no torch.distributed."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        return x

    def send_hidden(self, hidden: Tensor) -> None:
        raise AssertionError("a single shard has no next stage")

    def recv_hidden(self, into: Tensor) -> Tensor:
        raise AssertionError("a single shard has no stage before")

    def close(self) -> None:
        pass


class DistributedCollectives:
    """torch.distributed over gloo (CPU) or NCCL (CUDA)."""

    def __init__(self, layout: ShardLayout, group: dist.ProcessGroup | None) -> None:
        """`group` has this stage's shards; None where there is only one."""
        self._layout = layout
        self._group = group
        self._sending: deque[dist.Work] = deque()

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._group is not None:
            dist.all_reduce(x, group=self._group)
        return x

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        if self._group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self._layout.tp_size)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        return torch.cat(parts, -1)

    def send_hidden(self, hidden: Tensor) -> None:
        # A send holds its tensor. gloo tells that one is finished only to who waits for it; plans run in order and no
        # more are in flight than there are stages, so one that is so many sends old has long been received.
        if len(self._sending) > 2 * self._layout.pp_size:
            self._sending.popleft().wait()
        work = dist.isend(hidden, self._layout.rank + self._layout.tp_size)
        assert work is not None
        self._sending.append(work)

    def recv_hidden(self, into: Tensor) -> Tensor:
        dist.recv(into, self._layout.rank - self._layout.tp_size)
        return into

    def close(self) -> None:
        while self._sending:
            work = self._sending.popleft()
            with contextlib.suppress(RuntimeError):  # the receiver may be gone
                work.wait(CLOSE_TIMEOUT)
        if dist.is_initialized():
            dist.destroy_process_group()


def connect(layout: ShardLayout, init_method: str, timeout: float, device: torch.device) -> Collectives:
    """Meet the other shards of the replica.

    Args:
        init_method: `tcp://host:port` of rank 0; unused by a single shard.
        timeout: seconds, for the meeting and for every operation afterwards.

    Raises:
        EngineError: not all shards came in time.
    """
    if layout.world_size == 1:
        return SingleShard()
    bound = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            init_method=init_method,
            rank=layout.rank,
            world_size=layout.world_size,
            timeout=bound,
            device_id=device if device.type == "cuda" else None,
        )
        group = None
        if layout.tp_size > 1:
            for stage in range(layout.pp_size):  # every rank takes part in creating every group
                ranks = list(range(stage * layout.tp_size, (stage + 1) * layout.tp_size))
                stage_group = dist.new_group(ranks, timeout=bound)
                if stage == layout.pp_rank:
                    group = stage_group
    except (RuntimeError, ValueError) as error:
        raise EngineError(
            f"rank {layout.rank} of {layout.world_size} could not meet its peers at {init_method} in {timeout:g} s: "
            f"{error}"
        ) from error
    return DistributedCollectives(layout, group)
