"""From a request's headers and its `service_tier` to its latency targets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from ..cluster.errors import InvalidRequest
from ..cluster.latency_class import BATCH, CLASS_NAMES, DEFAULT, EXPLICIT, INTERACTIVE, LatencyTargets

CLASS_HEADER = "x-latency-class"
TTFT_HEADER = "x-ttft-target-ms"
TPOT_HEADER = "x-tpot-target-ms"
MAX_TARGET_MS = 86_400_000
"""A day."""

SERVICE_TIERS = {
    "auto": DEFAULT,
    "default": DEFAULT,
    "flex": BATCH,
    "priority": INTERACTIVE,
    "interactive": INTERACTIVE,
    "batch": BATCH,
}
"""OpenAI's service tiers, and our own names, as latency classes."""


def latency_targets(
    headers: Mapping[str, str], service_tier: str | None, classes: Mapping[str, LatencyTargets]
) -> LatencyTargets:
    """What a request may take.

    The class is that of the header, else that of `service_tier`, else the default one. Targets of its own make a
    request one of class `explicit`: what is not given is taken from its class, and it is refused rather than served
    late, since it says what it needs.

    Raises:
        InvalidRequest: an unknown class or tier, or a target that is no positive number.
    """
    name = headers.get(CLASS_HEADER)
    if name is not None and name not in CLASS_NAMES:
        raise InvalidRequest(
            f"{CLASS_HEADER} = {name[:80]!r}: unknown class; known: {', '.join(CLASS_NAMES)}", param=CLASS_HEADER
        )
    if name is None and service_tier is not None:
        if service_tier not in SERVICE_TIERS:
            raise InvalidRequest(
                f"service_tier = {service_tier[:80]!r}: unknown tier; known: {', '.join(SERVICE_TIERS)}",
                param="service_tier",
            )
        name = SERVICE_TIERS[service_tier]
    targets = classes[name or DEFAULT]
    ttft, tpot = _seconds(headers, TTFT_HEADER), _seconds(headers, TPOT_HEADER)
    if ttft is None and tpot is None:
        return targets
    return msgspec.structs.replace(
        targets,
        name=EXPLICIT,
        ttft=targets.ttft if ttft is None else ttft,
        tpot=targets.tpot if tpot is None else tpot,
        refuse_late=True,
    )


def _seconds(headers: Mapping[str, str], header: str) -> float | None:
    """The target in a header, in seconds; None without one."""
    text = headers.get(header)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_TARGET_MS:  # also false for NaN
        raise InvalidRequest(
            f"{header} = {text[:80]!r}: must be a number of milliseconds > 0 and <= {MAX_TARGET_MS}", param=header
        )
    return value / 1000
