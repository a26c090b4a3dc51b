"""What shards of a replica tell each other in tensors: sums and concatenations within a stage, hidden states between.

All pp * tp shards form one torch.distributed world. Each stage is a group of its own; shard (p, t) hands its hidden
states to (p + 1, t).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from datetime import timedelta
from typing import Protocol
from urllib.parse import urlsplit

import psutil
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
        """Hand [T, hidden] to the next stage. Returns at once; the tensor may be changed afterwards."""

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
        self._on_device = dist.get_backend() == "nccl"

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
        # A copy, because the decoder's next step overwrites what it returned.
        work = dist.isend(hidden.clone(), self._layout.rank + self._layout.tp_size)
        assert work is not None
        self._sending.append(work)

    def recv_hidden(self, into: Tensor) -> Tensor:
        dist.recv(into, self._layout.rank - self._layout.tp_size)
        return into

    def close(self) -> None:
        while self._sending:
            work = self._sending.popleft()
            if not self._on_device:  # there, the stream would wait and not this thread
                with contextlib.suppress(RuntimeError):  # the receiver may be gone
                    work.wait(CLOSE_TIMEOUT)
        if dist.is_initialized():
            dist.destroy_process_group()


def connect(
    layout: ShardLayout, init_method: str, timeout: float, device: torch.device, listen_fd: int | None = None
) -> Collectives:
    """Meet the other shards of the replica.

    torch.distributed authenticates nobody, so nothing here listens on more than one address: the rendezvous on the one
    that `init_method` names, the shards' own sockets on the interface through which they reach it.

    Args:
        init_method: `tcp://host:port` of rank 0; unused by a single shard.
        timeout: seconds, for the meeting and for every operation afterwards.
        listen_fd: for rank 0, a socket that is bound to `init_method` already, which this call takes over; None makes
            one.

    Raises:
        EngineError: not all shards came in time.
    """
    if layout.world_size == 1:
        return SingleShard()
    bound = timedelta(seconds=timeout)
    address = urlsplit(init_method)
    host, port = address.hostname, address.port
    assert host is not None, "the rendezvous is tcp://host:port"
    assert port is not None, "the rendezvous is tcp://host:port"
    try:
        _use_interface_towards(host)
        if layout.rank == 0 and listen_fd is None:
            listen_fd = rendezvous_socket(host, port).detach()
        store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in __all__
            host, port, layout.world_size, is_master=layout.rank == 0, timeout=bound, master_listen_fd=listen_fd
        )
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=store,
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
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(
            f"rank {layout.rank} of {layout.world_size} could not meet its peers at {init_method} in {timeout:g} s: "
            f"{error}"
        ) from error
    return DistributedCollectives(layout, group)


def rendezvous_socket(host: str, port: int = 0) -> socket.socket:
    """A socket that listens on `host` for a replica's shards; port 0 takes a free one.

    Whoever opens it keeps it until `connect` takes it over, so that nobody can be given its port in between.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=64)


def _use_interface_towards(host: str) -> None:
    """Have gloo and NCCL listen on the interface that leads to `host`, unless their variables name one already.

    Left alone, gloo takes the one that the machine's name resolves to, and NCCL every one that it finds.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # sends nothing, but chooses the route
        own = probe.getsockname()[0]
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == own for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": this name, not names that begin so
            return
