"""From a `RopeSpec` to cosines and sines of token positions.

The formulas are those of the cited papers and of transformers' `modeling_rope_utils.py`, against which they are tested,
with one deliberate difference: a rotation is a function of the token's own position and nothing else, since a paged
cache holds keys that were rotated long ago and may be shared. transformers rotates a whole call by its longest
sequence ("dynamic") or switches factors when a sequence outgrows the original context ("longrope"); here

- dynamic: a token at position p turns as in a sequence of max(p + 1, original context) tokens;
- longrope: the long factors apply throughout if the served context exceeds the original one, else the short ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cluster.rope_spec import RopeSpec
from ..kernels.interface import Kernels, Rotation


class Rotary:
    """One rotary embedding on one device."""

    def __init__(self, spec: RopeSpec, max_model_len: int, device: torch.device) -> None:
        self._spec = spec
        self._inv_freq = inverse_frequencies(spec, max_model_len).to(device)
        self._exponents = exponents(spec).to(device)

    @property
    def depends_on_positions(self) -> bool:
        """Whether every position has frequencies of its own."""
        return self._spec.rope_type == "dynamic"

    def cos_sin(self, positions: Tensor, kernels: Kernels, out: Rotation | None = None) -> Rotation:
        """Cosines and sines of positions [T] int64, as `Kernels.rotation` says."""
        inv_freq = self._inv_freq
        if self.depends_on_positions:
            inv_freq = dynamic_frequencies(self._spec, positions + 1, self._exponents)
        return kernels.rotation(positions, inv_freq, self._spec.attention_factor, out)


def inverse_frequencies(spec: RopeSpec, max_model_len: int) -> Tensor:
    """[rotary_dim / 2] float32: radians per position; for type dynamic within the original context."""
    if spec.rope_type == "longrope":
        factors = spec.long_factor if max_model_len > spec.original_max_position else spec.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * spec.theta ** exponents(spec))
    frequencies = 1.0 / spec.theta ** exponents(spec)
    if spec.rope_type == "linear":
        return frequencies / spec.factor
    if spec.rope_type == "llama3":
        return _llama3(spec, frequencies)
    if spec.rope_type == "yarn":
        return _yarn(spec, frequencies)
    return frequencies


def dynamic_frequencies(spec: RopeSpec, lengths: Tensor, exponents: Tensor) -> Tensor:
    """Dynamic NTK: the base grows with the sequence.

    Args:
        lengths: [T] sequence lengths in tokens.
        exponents: [rotary_dim / 2] float32, of the base; on the device of `lengths`.

    Returns:
        [T, rotary_dim / 2] float32.
    """
    growth = lengths.clamp(min=spec.original_max_position).double() / spec.original_max_position
    exponent = spec.rotary_dim / (spec.rotary_dim - 2)
    base = spec.theta * (spec.factor * growth - (spec.factor - 1)) ** exponent
    return 1.0 / base.float()[:, None] ** exponents


def exponents(spec: RopeSpec) -> Tensor:
    """[rotary_dim / 2] float32: of the base, for every pair of dimensions."""
    return torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim


def _llama3(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    rotations = spec.original_max_position * frequencies / (2 * math.pi)  # within the original context
    smooth = (rotations - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / spec.factor + smooth * frequencies


def _yarn(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): the same idea with a ramp over dimensions."""

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times within the original context."""
        wavelength = spec.original_max_position / (rotations * 2 * math.pi)
        return spec.rotary_dim * math.log(wavelength) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = (torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)
    interpolated = ramp.clamp(0.0, 1.0)
    return frequencies / spec.factor * interpolated + frequencies * (1 - interpolated)
