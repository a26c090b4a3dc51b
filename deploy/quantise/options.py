"""What a user decides about a quantisation, checked before anything is read."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path

from ...cluster.errors import ConfigError

BITS = (8, 4, 3)
CHANNEL = -1
"""As a group size: one scale for all inputs of an output."""
USUAL_GROUP_SIZES = (256, 128, 64, 32, 16, 8)


class Method(enum.StrEnum):
    """How weights are rounded: to nearest, with error compensation, or after scaling what matters."""

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"


@dataclasses.dataclass(frozen=True)
class QuantiseOptions:
    """One quantisation. The same options and the same model give the same bytes on the same machine."""

    method: Method
    bits: int = 4
    group_size: int = 128
    """Inputs that share a scale; `CHANNEL`: all."""
    symmetric: bool = True
    activation_bits: int | None = None
    """8: the checkpoint asks for activations rounded to int8, a scale per token; None: they stay as they are."""
    head_bits: int | None = None
    """8 or 4: the output projection is rounded to this; None: it stays as it is."""
    calibration: Path | None = None
    """JSON lines with `text` or `messages`; None: none, or the embedded models' own."""
    samples: int = 512
    """Sequences to calibrate with."""
    sequence_length: int = 512
    """Tokens of a sequence at most."""
    seed: int = 0
    """Of the choice of calibration sequences."""

    def check(self) -> None:
        """
        Raises:
            ConfigError: a value that is not supported, or two that exclude each other.
        """
        if self.bits not in BITS:
            raise ConfigError(f"--bits {self.bits} is not supported; use {_listed(BITS)}")
        if self.group_size != CHANNEL and (self.group_size < 2 or self.group_size % 2):
            raise ConfigError(
                f"--group-size {self.group_size} is not supported; use an even number that divides the inputs, such as "
                f"128 or 64, or {CHANNEL} for one scale per output"
            )
        if self.activation_bits is not None and (self.bits != 8 or self.group_size != CHANNEL or not self.symmetric):
            raise ConfigError(
                f"--activations int8 needs --bits 8 --group-size {CHANNEL} and symmetric weights; given: --bits "
                f"{self.bits} --group-size {self.group_size}{'' if self.symmetric else ' --asymmetric'}"
            )
        if self.head_bits not in (None, 8, 4):
            raise ConfigError(f"--head-bits {self.head_bits} is not supported; use 8 or 4, or leave it out")
        for flag, value in (("--samples", self.samples), ("--sequence-length", self.sequence_length)):
            if value < 2:
                raise ConfigError(f"{flag} {value} is too small; at least 2 are needed")

    def check_group_size(self, inputs: Mapping[str, int]) -> None:
        """
        Args:
            inputs: number of inputs by weight, of all weights to be quantised.

        Raises:
            ConfigError: the group size does not divide one of them; names it and sizes that fit all.
        """
        if self.group_size == CHANNEL:
            return
        for name, size in inputs.items():
            if size % self.group_size:
                fitting = [group for group in USUAL_GROUP_SIZES if not any(n % group for n in inputs.values())]
                raise ConfigError(
                    f"--group-size {self.group_size} does not divide the {size} inputs of {name}; all weights allow "
                    f"{_listed([*fitting, CHANNEL])}"
                )


def _listed(values: tuple[int, ...] | list[int]) -> str:
    return " or ".join(map(str, values))
