"""Matrix products by torch, with weights in the checkpoint's order or in the one that oneDNN reads; see
`interface.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class PlainLinear:
    """A weight in the checkpoint's order, [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self._bias)

    def float32(self, x: Tensor) -> Tensor:
        """See `interface.Linear`; rounded to x's dtype on the way."""
        return self(x).float()

    def add_to(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Linear`."""
        hidden.add_(self(x), alpha=alpha)


def look_up(weight: Tensor, tokens: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Rows of an embedding [vocab, hidden] times `scale`, as `interface.Kernels.embed` says."""
    hidden = functional.embedding(tokens, weight)
    if scale != 1.0:
        hidden.mul_(scale)
    return hidden if out is None else out.copy_(hidden)


class PackedLinear(PlainLinear):
    """A weight in oneDNN's blocked order, packed once.

    With a plain weight oneDNN packs it anew in every call. On an AVX-512-BF16 core, [1024 → 2048] in bfloat16 takes
    0.68 instead of 0.95 ms for 32 rows and 0.25 instead of 0.40 ms for one row; in float32 and 32 rows 1.4 instead of
    2.8 ms.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, None), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self._bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch build has oneDNN's packed product for `dtype` on `device`."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    if not (hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and operators._is_mkldnn_bf16_supported())
