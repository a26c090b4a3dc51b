"""`/metrics` of the whole cluster: what every node's metrics agent publishes about this application."""

from __future__ import annotations

import asyncio
import logging
import re
import time

import httpx
import ray

logger = logging.getLogger(__name__)

_SERIES = re.compile(r"(?:# (?:HELP|TYPE) )?ray_(?:troupe|serve)_")
_COMMENT = re.compile(r"# (?:HELP|TYPE) (\S+)")
_NODES_SECONDS = 10.0
"""How long the list of nodes stays valid."""


def keep_own_series(text: str) -> str:
    """The lines of a Prometheus text that are about Troupe or Ray Serve, with their comments."""
    return "".join(line for line in text.splitlines(keepends=True) if _SERIES.match(line))


def joined(texts: list[str]) -> str:
    """One Prometheus text out of several: each metric's comments once, with all its series behind them."""
    comments: dict[str, dict[str, None]] = {}
    series: dict[str, list[str]] = {}
    for text in texts:
        metric = ""
        for line in text.splitlines():
            if match := _COMMENT.match(line):
                metric = match[1]
                comments.setdefault(metric, {})[line] = None
            elif line:
                series.setdefault(metric, []).append(line)
    lines = [line for metric in series for line in (*comments.get(metric, ()), *series[metric])]
    return "\n".join(lines) + "\n" if lines else ""


class ClusterMetrics:
    """Collects the nodes' metrics on request."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        """Wait at most `timeout_s` for each node; a node that does not answer is left out."""
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False)
        self._addresses: list[str] = []
        self._listed_at = float("-inf")

    async def text(self) -> str:
        """The metrics in Prometheus' text format."""
        if time.monotonic() - self._listed_at > _NODES_SECONDS:
            self._addresses = await asyncio.to_thread(_agent_addresses)
            self._listed_at = time.monotonic()
        return joined(await asyncio.gather(*map(self._of_node, self._addresses)))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _of_node(self, address: str) -> str:
        try:
            response = await self._client.get(f"http://{address}/metrics")
            response.raise_for_status()
        except httpx.HTTPError as error:
            logger.warning("no metrics from node %s: %s", address, error or type(error).__name__)
            return ""
        return keep_own_series(response.text)


def _agent_addresses() -> list[str]:
    """`host:port` of the metrics agents of all nodes that are alive."""
    return [
        f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort")
    ]
