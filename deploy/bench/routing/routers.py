"""The routers that are compared, by the names that they have in reports."""

from __future__ import annotations

import msgspec

from ..options import parse_names

OURS = "troupe"
_HERE = __name__.rpartition(".")[0]


class Contender(msgspec.Struct, frozen=True):
    """One of the routers."""

    import_path: str | None
    """Of a `RequestRouter` of Ray Serve; None: what `troupe serve` does."""
    blocks: bool = False
    """It blocks the thread in which it runs, so it gets one of its own."""


ROUTERS = {
    OURS: Contender(None),
    "round-robin": Contender(f"{_HERE}.round_robin.RoundRobin"),
    "power-of-two": Contender("ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"),
    "prefix-affinity": Contender(f"{_HERE}.prefix_affinity.PrefixAffinity", blocks=True),
    "prefix-affinity-10": Contender(f"{_HERE}.prefix_affinity.BalancedPrefixAffinity", blocks=True),
}
"""By name. `power-of-two` is Serve's default, both `prefix-affinity` are Ray's PrefixCacheAffinityRouter."""


def parse_routers(text: str) -> list[str]:
    """See `parse_names`."""
    return parse_names("--routers", text, ROUTERS)
