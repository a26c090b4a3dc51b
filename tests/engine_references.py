"""transformers' greedy answers, which the check on a GPU asks for too: `deploy/bench/gpu/family_references.py`."""

from raytroupe.deploy.bench.gpu.family_references import LONGEST, NEW_TOKENS, FamilyReference, family_reference

__all__ = ["LONGEST", "NEW_TOKENS", "FamilyReference", "family_reference"]
