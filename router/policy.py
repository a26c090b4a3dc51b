"""Which replica takes a request. Pure functions of what is known of the candidates."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import msgspec


class Candidate(msgspec.Struct, frozen=True):
    """A replica that could take the request, as this process sees it."""

    replica: str
    outstanding_tokens: int
    """Prompt and output tokens of the requests sent there and not finished, counting the most they may generate."""
    last_routed: int = 0
    """Value of a counter of routed requests when one last went there; 0: never."""


def fewest_outstanding_tokens(candidates: Iterable[Candidate], salt: str = "") -> list[str]:
    """Replica names, best first: fewest outstanding tokens, then the one that was given work least recently.

    Replicas that are equal in both are ordered by a hash of `salt` and name: the same for the same arguments, but
    different between ingresses that use different salts, so that their first requests do not all meet at one replica.
    """

    def key(candidate: Candidate) -> tuple[int, int, int, str]:
        tie = zlib.crc32(f"{salt}/{candidate.replica}".encode())
        return (candidate.outstanding_tokens, candidate.last_routed, tie, candidate.replica)

    return [candidate.replica for candidate in sorted(candidates, key=key)]
