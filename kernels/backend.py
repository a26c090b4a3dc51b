"""The kernels of one device and dtype, chosen once when a shard loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .activation import gated_activation
from .linear import Linear, PackedLinear, PlainLinear, can_pack
from .moe import route, run_experts
from .native_attention import can_decode
from .norm import rms_norm, scale_by_rms, sum_of_squares
from .paged_attention import PagedAttention, store_kv
from .rotary import rotate_


@dataclasses.dataclass(frozen=True, slots=True)
class Kernels:
    """One function per operation; their meaning is documented where the torch reference defines it."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    sum_of_squares: Callable[[Tensor], Tensor]
    scale_by_rms: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rotate_: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_activation: Callable[[Tensor, str], Tensor]
    store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    attention: PagedAttention
    route: Callable[[Tensor, int, bool], tuple[Tensor, Tensor]]
    run_experts: Callable[..., Tensor]
    linear: Callable[[Tensor, Tensor | None], Linear]
    """Takes a weight [out, in] and a bias, and owns them from then on."""


def load_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for a device and dtype. Not shared between decoders: attention has a workspace."""
    return Kernels(
        rms_norm=rms_norm,
        sum_of_squares=sum_of_squares,
        scale_by_rms=scale_by_rms,
        rotate_=rotate_,
        gated_activation=gated_activation,
        store_kv=store_kv,
        attention=PagedAttention(native_decode=can_decode(device, dtype)),
        route=route,
        run_experts=run_experts,
        linear=PackedLinear if can_pack(device, dtype) else PlainLinear,
    )
