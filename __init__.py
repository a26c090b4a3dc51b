"""Troupe: a distributed serving cluster for large language models on Ray."""

__version__ = "0.1.0"
