"""The tiny models of every family, which the check on a GPU makes too: `deploy/bench/gpu/tiny_models.py`."""

from raytroupe.deploy.bench.gpu.tiny_models import FAMILIES, VOCAB_SIZE, WINDOW, load_reference, make_tiny_model

__all__ = ["FAMILIES", "VOCAB_SIZE", "WINDOW", "load_reference", "make_tiny_model"]
