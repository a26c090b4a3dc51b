"""The Triton kernels behind the interface, for NVIDIA GPUs; under Triton's interpreter they run on a CPU, for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ..attention_metadata import AttentionMetadata
from ..interface import Experts, ExpertWeights, Linear, Plan, Program, Rotation
from ..linear import PlainLinear, look_up
from ..quantised_weight import QuantisedWeight, Weight
from ..uploads import Uploads
from . import norm, rotary, routing
from .argmax import argmax
from .linear import TritonGatedLinear, TritonLinear
from .moe import TritonExperts
from .paged_attention import PagedAttention, TritonPlan
from .quantised_layout import Workspace
from .quantised_moe import TritonQuantisedExperts, can_group
from .quantised_operations import Product, TritonQuantisedLinear, new_product

_INTERPRETED_PROCESSORS = 4
"""Of the imagined device that the interpreter is: few, so that tests cut rows without being long."""
_INTERPRETED_SHARED_MEMORY = 96 * 1024


def device_limits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory that one program may have)."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS, _INTERPRETED_SHARED_MEMORY
    index = torch.cuda.current_device() if device.index is None else device.index
    shared_memory = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return torch.cuda.get_device_properties(device).multi_processor_count, shared_memory


def multiplies_float8(device: torch.device) -> bool:
    """Whether there are matrix units for float8: from Ada and Hopper on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


class TritonKernels:
    """See `interface.Kernels`. Not shared between decoders: attention has a workspace."""

    steps_on_device = True

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.saved_bytes = 0
        self.attend = PagedAttention(device, dtype, *device_limits(device))
        self._workspace = Workspace(device, dtype)

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        """See `interface.Kernels`."""
        if isinstance(weight, QuantisedWeight):
            return TritonQuantisedLinear(self._quantised_product(weight, bias, None))
        return TritonLinear(weight, bias)

    def tied_linear(self, weight: Tensor) -> Linear:
        """See `interface.Kernels`."""
        return self.linear(weight)

    def gated_linear(self, weight: Weight, bias: Tensor | None, activation: str) -> Callable[[Tensor], Tensor]:
        """See `interface.Kernels`."""
        if isinstance(weight, QuantisedWeight):
            return TritonQuantisedLinear(self._quantised_product(weight, bias, activation))
        return TritonGatedLinear(weight, bias, activation)

    def _quantised_product(self, weight: QuantisedWeight, bias: Tensor | None, activation: str | None) -> Product:
        product = new_product(weight, bias, activation, self._workspace, float8=multiplies_float8(self.device))
        self.saved_bytes += weight.nbytes - product.nbytes
        return product

    def route(self, logits: Tensor, experts_per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
        """See `interface.Kernels`."""
        return routing.route(logits, experts_per_token, normalize)

    def experts(self, gate_up: ExpertWeights, down: ExpertWeights, activation: str) -> Experts:
        """See `interface.Kernels`."""
        if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
            return TritonExperts(gate_up, down, activation)
        if not isinstance(gate_up, Tensor) and not isinstance(down, Tensor) and can_group(gate_up) and can_group(down):
            experts = TritonQuantisedExperts(gate_up, down, activation, self.dtype)
            self.saved_bytes += sum(weight.nbytes for weight in (*gate_up, *down)) - experts.nbytes
            return experts
        return self._dense_experts(gate_up, down, activation)

    def _dense_experts(self, gate_up: ExpertWeights, down: ExpertWeights, activation: str) -> Experts:
        """Experts of which one projection cannot be grouped: in 16 bits. Activations then stay as they are."""
        hidden, width = len(down[0]), len(gate_up[0]) // 2
        dense = [
            weights
            if isinstance(weights, Tensor)
            else torch.stack([weight.dense(inputs, self.dtype) for weight in weights])
            for weights, inputs in ((gate_up, hidden), (down, width))
        ]
        self.saved_bytes += sum(weight.nbytes for weights in (gate_up, down) for weight in weights)
        self.saved_bytes -= sum(weights.nbytes for weights in dense)
        return TritonExperts(dense[0], dense[1], activation)

    def embed(self, embedding: Linear, tokens: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """See `interface.Kernels`."""
        assert isinstance(embedding, PlainLinear)
        return look_up(embedding.weight, tokens, scale, out)

    def rotation(
        self, positions: Tensor, inverse_frequencies: Tensor, factor: float, out: Rotation | None = None
    ) -> Rotation:
        """See `interface.Kernels`."""
        return rotary.rotation(positions, inverse_frequencies, factor, out)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, in_place: bool = False, rows: Tensor | None = None
    ) -> Tensor:
        """See `interface.Kernels`."""
        out = (
            x if in_place else torch.empty(len(x if rows is None else rows), x.shape[1], dtype=x.dtype, device=x.device)
        )
        return norm.rms_norm(x, weight, eps, out=out, rows=rows)

    def argmax(self, logits: Tensor) -> Tensor:
        """See `interface.Kernels`."""
        return argmax(logits)

    def add_(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Kernels`."""
        hidden.add_(x, alpha=alpha)

    def add_norm(self, hidden: Tensor, x: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        """See `interface.Kernels`."""
        return norm.add_rms_norm(hidden, x, alpha, weight, eps)

    def rotate_and_store(
        self,
        qkv: Tensor,
        rotation: Rotation,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Plan,
        *,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `interface.Kernels`."""
        slots = plan.metadata.slot_mapping
        return rotary.rotate_and_store(qkv, rotation, k_cache, v_cache, slots, norms, eps, scales)

    def plan(self, metadata: AttentionMetadata, block_size: int, tokens: Tensor | None = None) -> TritonPlan:
        """See `interface.Kernels`."""
        return TritonPlan(metadata, self.attend, lambda arrays: Uploads(self.device)(arrays))

    def attention(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Plan,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `interface.Kernels`."""
        assert isinstance(plan, TritonPlan)
        tables = plan.metadata.block_tables
        return self.attend(
            query, k_cache, v_cache, tables, plan.work, scale=scale, window=window, softcap=softcap, scales=scales
        )

    def on_host(self, function: Callable[[Tensor], Tensor], x: Tensor, *, in_place: bool = False) -> Tensor:
        """See `interface.Kernels`: on a GPU that is any operation of torch's, on the same stream."""
        return function(x)

    def begin_layer(self) -> None:
        """See `interface.Kernels`."""

    def new_program(self, max_rows: int) -> Program | None:
        """See `interface.Kernels`: CUDA graphs record the whole step (`actors/decode_graphs.py`)."""
        return None
