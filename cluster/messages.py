"""What crosses between an ingress and a replica's scheduler.

One unary Serve call per request is its *control*: it carries a `GenerateCall`, lasts as long as the request, and
returns a `GenerateReply`. Cancelling it aborts the request. The tokens take another way: after every engine step the
scheduler pushes one `TokenBatch` to each ingress that waits for something from that step (ZeroMQ, PUSH to PULL). An
output without tokens comes first: it says that the scheduler has the request.
"""

from __future__ import annotations

import msgspec

from .price import TokenPrices
from .request import EngineRequest, TokenOutput


class Endpoint(msgspec.Struct, frozen=True):
    """A bound ZeroMQ socket and the CURVE keys (Z85 text) that a peer needs to connect to it.

    The secrets travel through Ray only, whose own authentication guards them.
    """

    address: str
    """`tcp://host:port`; host is loopback or the node's Ray address."""
    server_public_key: str
    client_public_key: str
    client_secret_key: str


class GenerateCall(msgspec.Struct):
    """Control message: serve this request and send its tokens there."""

    request: EngineRequest
    reply_to: Endpoint
    target: str = ""
    """The replica that was chosen for it, by Serve's unique id; "": any."""


class SubscribeCall(msgspec.Struct):
    """Control message: send reports (`cluster/replica_report.py`) there from now on, first of all a snapshot."""

    reports_to: Endpoint
    target: str = ""


class GenerateReply(msgspec.Struct):
    """How a request ended. `error` is None after a normal end; its tokens may still be on their way."""

    error: str | None = None
    error_kind: str | None = None
    """Class name in `cluster/errors.py`: QueueFull, InvalidRequest, ShardFailed …"""
    retry_after: int = 1


class TokenBatch(msgspec.Struct, array_like=True):
    """All outputs of one engine step for one ingress."""

    outputs: list[TokenOutput]


class ModelCard(msgspec.Struct, kw_only=True):
    """What an ingress must know of a served model."""

    name: str
    path: str
    """Folder with the tokenizer; the ingress reads it on its own node."""
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: dict[str, float] = {}
    """temperature, top_p, top_k, repetition_penalty of the model's generation_config.json."""
    created: int = 0
    """Unix seconds."""
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_num_waiting: int = 1024
    """Limits of a replica's scheduler."""
    price_per_hour: float | None = None
    """Dollars a replica, if the configuration says so."""
    estimated_prices: TokenPrices = TokenPrices(0.0, 0.0, estimated=True)
    """Used without one."""
    weight_bytes: int = 0
    """Of one replica: the largest model is taken for the best one where nothing was measured."""
    accuracy: float | None = None
    """Share of the questions of its evaluation that it answers right, 0 to 1."""
    task_accuracy: dict[str, float] = {}
    """The same by task."""


class LoadProgress(msgspec.Struct, tag=True):
    """A shard has read so many bytes of its weights."""

    model: str
    replica: str
    rank: int
    loaded_bytes: int
    total_bytes: int


class Notice(msgspec.Struct, tag=True):
    """One line for the person who started the application."""

    model: str
    text: str
    warning: bool = False


class StartFailed(msgspec.Struct, tag=True):
    """A replica cannot start; trying again would not help."""

    model: str
    kind: str
    """Class name in `cluster/errors.py`, or of an unexpected exception."""
    cause: str


Report = LoadProgress | Notice | StartFailed
"""What replicas tell the process that started the application (`actors/reporter.py` → `deploy/`)."""
