"""Every error that Troupe raises on purpose, as one tree.

TroupeError
├── ConfigError              refused before anything starts: a flag, a YAML field, a topology, a memory size
├── CheckpointError          the model folder: missing, truncated, a tensor absent or of the wrong shape
│   └── UnsupportedModel     an architecture, rope scaling or activation that is not known
├── RequestError             one request is at fault or cannot be served now; carries the HTTP status
│   ├── InvalidRequest       400, names the parameter
│   ├── ModelNotFound        404
│   ├── PayloadTooLarge      413
│   ├── QueueFull            429, carries `retry_after` in seconds
│   │   └── TargetUnreachable    the latency target of the request cannot be met now
│   └── ReplicaUnavailable   503: no replica could finish the request
└── EngineError              our side failed: a shard died, a channel closed
    └── ShardFailed          names rank and node
        └── StepFailed       a step raised: its requests may be the cause

Every message says what was wrong, with the offending value, and what to do. `assert` is for our own bugs only.
"""

from __future__ import annotations


class TroupeError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(TroupeError):
    """A configuration that cannot work, found before anything starts."""


class CheckpointError(TroupeError):
    """A model folder that cannot be loaded. The message names the file or the tensor."""


class UnsupportedModel(CheckpointError):
    """A model whose architecture or options are not implemented. The message lists what is."""


class RequestError(TroupeError):
    """One request cannot be served; the engine is untouched.

    `status` is the HTTP status, `type` and `code` follow OpenAI's error body, `param` names the request field.
    """

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(RequestError):
    """A malformed or out-of-range request (400)."""


class ModelNotFound(RequestError):
    """The requested model is not served here (404)."""

    status = 404
    code = "model_not_found"


class PayloadTooLarge(RequestError):
    """The request body exceeds the limit (413)."""

    status = 413
    code = "payload_too_large"


class QueueFull(RequestError):
    """Too many requests wait already (429). `retry_after` is in seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TargetUnreachable(QueueFull):
    """The first token cannot come within the request's target any more, and its class wants to know at once (429)."""

    code = "target_unreachable"


class ReplicaUnavailable(RequestError):
    """No replica could take or finish the request (503)."""

    status = 503
    type = "server_error"
    code = "replica_unavailable"


class EngineError(TroupeError):
    """The engine itself failed; its requests can be resubmitted elsewhere."""


class ShardFailed(EngineError):
    """A shard actor died or raised. The message names its rank, its node and the cause."""


class StepFailed(ShardFailed):
    """A shard raised in a step. One of the step's requests may be the cause, so another shard may raise as well."""
