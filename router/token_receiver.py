"""Where tokens arrive at an ingress: one ZeroMQ socket, one mailbox per request.

    schedulers ── PUSH ──▶ PULL ── TokenBatch ──▶ Mailbox of request a ──▶ its reader
                                             └──▶ Mailbox of request b ──▶ its reader

Nothing here waits for a reader: what a slow one has not taken yet is merged into a single output.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType

import msgspec

from ..cluster.messages import TokenBatch
from ..cluster.request import TokenOutput
from .message_receiver import MessageReceiver

logger = logging.getLogger(__name__)


class TokensMissing(Exception):
    """Tokens of a request were lost on their way."""


class Mailbox:
    """Tokens of one request that its reader has not taken yet, and whether more can come."""

    def __init__(self, first_index: int = 0) -> None:
        """Expect the request's generated tokens from number `first_index` on."""
        self._next = first_index
        self._waiting: TokenOutput | None = None
        self._error: BaseException | None = None
        self.closed = False
        """No more outputs will come."""
        self._reader: asyncio.Future[None] | None = None
        """What the reader waits for; there is one reader. A plain future costs a third of an event."""

    def put(self, output: TokenOutput) -> None:
        """Add an output, which belongs to the mailbox from now on; it becomes part of the one that waits.

        Tokens that have come before are left out. If some are missing before it, the mailbox closes with
        `TokensMissing`.
        """
        if output.index > self._next:
            if self._error is None:
                self.close(TokensMissing(f"token {output.index} came when token {self._next} was due"))
            return
        if seen := self._next - output.index:
            output.drop_first(seen)
            if not output.tokens and output.finish_reason is None:
                return
        self._next += len(output.tokens)
        if self._waiting is None:
            self._waiting = output
        else:
            self._waiting.absorb(output)
        self._wake()

    def close(self, error: BaseException | None = None) -> None:
        """No more outputs are expected; a reader without any gets `error`, or None."""
        self.closed, self._error = True, error
        self._wake()

    async def get(self) -> TokenOutput | None:
        """The next output, all that has arrived in one; None if the mailbox is closed and empty."""
        while (output := self.take()) is None and not self.closed:
            await self.arrival()
        return output

    def take(self) -> TokenOutput | None:
        """What `get` would return at once; None if nothing is there.

        Raises:
            Exception: what the mailbox was closed with, when it is empty.
        """
        output, self._waiting = self._waiting, None
        if output is None and self._error is not None:
            raise self._error
        return output

    def arrival(self) -> asyncio.Future[None]:
        """Done when `take` is worth another try. For the one reader, who has just found nothing in an open mailbox."""
        self._reader = asyncio.get_running_loop().create_future()
        return self._reader

    def _wake(self) -> None:
        if (reader := self._reader) is not None:
            self._reader = None
            if not reader.done():  # else it was cancelled
                reader.set_result(None)


class TokenReceiver:
    """Receives `TokenBatch` messages and hands their outputs to the mailboxes of the requests.

    Use it on one event loop.
    """

    def __init__(self, host: str) -> None:
        """Bind a socket on `host`, loopback or the node's Ray address, at a free port. Reading begins with `start`."""
        self._mailboxes: dict[str, Mailbox] = {}
        self._decoder = msgspec.msgpack.Decoder(TokenBatch)
        self._receiver = MessageReceiver(host, self._dispatch)
        self.endpoint = self._receiver.endpoint

    def start(self) -> None:
        """Begin to read, on the running event loop. Calling it again does nothing."""
        self._receiver.start()

    def close(self) -> None:
        """Stop reading and free the port."""
        self._receiver.close()

    def open(self, request_id: str, first_index: int = 0) -> MailboxLease:
        """A mailbox for the tokens of `request_id` from number `first_index` on, for the time of a `with` block.

        Outputs for ids without one are dropped.
        """
        return MailboxLease(self._mailboxes, request_id, first_index)

    def _dispatch(self, message: bytes) -> None:
        try:
            batch = self._decoder.decode(message)
        except msgspec.MsgspecError as error:
            logger.error("dropped a malformed token message of %d bytes: %s", len(message), error)
            return
        for output in batch.outputs:
            if (mailbox := self._mailboxes.get(output.request_id)) is not None:
                mailbox.put(output)


class MailboxLease:
    """Context manager that registers a mailbox and takes it away again."""

    def __init__(self, mailboxes: dict[str, Mailbox], request_id: str, first_index: int) -> None:
        self._mailboxes = mailboxes
        self._request_id = request_id
        self._first_index = first_index

    def __enter__(self) -> Mailbox:
        assert self._request_id not in self._mailboxes, f"request id {self._request_id} is used twice"
        mailbox = self._mailboxes[self._request_id] = Mailbox(self._first_index)
        return mailbox

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        del self._mailboxes[self._request_id]
