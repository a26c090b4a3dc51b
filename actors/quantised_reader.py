"""Reading quantised weights: the packed tensors of a few at a time, which become the form that kernels take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..cluster.quantisation import Quantisation
from ..kernels.quantised_weight import Weight, stack_weights
from .checkpoint import Checkpoint
from .quantised_layouts import QuantisedSlice, is_plain, plan_slice
from .weight_names import TensorSlice
from .weight_reader import plan_reads, read_weights

BATCH_BYTES = 64 * 2**20
"""Packed tensors that are read together: what loading needs besides the weights, and one unpacked matrix."""


@dataclasses.dataclass(frozen=True, slots=True)
class StackedWeight:
    """A weight of slices one below the other, at least one of which is quantised."""

    parts: list[QuantisedSlice | TensorSlice]
    inputs: int

    @property
    def slices(self) -> Iterator[TensorSlice]:
        """All that is to be read."""
        for part in self.parts:
            if isinstance(part, TensorSlice):
                yield part
            else:
                yield from part.parts.values()


class QuantisedSource(Protocol):
    """Where quantised weights come from: a checkpoint, or chance."""

    def plan(
        self,
        stacks: Sequence[list[TensorSlice]],
        place: Callable[[list[Weight]], None],
        *,
        only_if_stored_so: bool = False,
    ) -> bool:
        """Take weights over if a module among them is quantised.

        Args:
            stacks: for every weight the slices, one below the other, as if nothing were quantised.
            place: takes the weights, now or when they have been read.
            only_if_stored_so: a config that says that they are quantised may be wrong.

        Returns:
            Whether there is such a module; otherwise nothing is done.

        Raises:
            CheckpointError: a tensor is missing, or the config and the checkpoint disagree.
        """


class QuantisedReader:
    """Plans first, so that missing tensors are found at once and the bytes are known; then reads."""

    def __init__(
        self, checkpoint: Checkpoint, quantisation: Quantisation | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`dtype`: of weights that are not quantised or cannot stay so."""
        self._checkpoint, self._quantisation = checkpoint, quantisation
        self._dtype, self._device = dtype, device
        self._planned: list[tuple[list[StackedWeight], Callable[[list[Weight]], None]]] = []
        self.nbytes = 0
        """Of all that was planned, as it is stored."""

    def plan(
        self,
        stacks: Sequence[list[TensorSlice]],
        place: Callable[[list[Weight]], None],
        *,
        only_if_stored_so: bool = False,
    ) -> bool:
        """See `QuantisedSource`; `read` calls `place`."""
        if self._quantisation is None:
            return False
        if only_if_stored_so and all(is_plain(piece, self._checkpoint) for stack in stacks for piece in stack):
            return False
        planned = [StackedWeight([self._part(piece) for piece in stack], stack[0].num_columns or 0) for stack in stacks]
        if not any(isinstance(part, QuantisedSlice) for stack in planned for part in stack.parts):
            return False
        self.nbytes += sum(self._stored_bytes(stack) for stack in planned)
        self._planned.append((planned, place))
        return True

    def read(self, advance: Callable[[int], None]) -> None:
        """Read all that was planned and put it into its places.

        Args:
            advance: see `weight_reader.read_weights`.
        """
        for batch in self._batches():
            tensors = [[self._reserve(piece) for piece in stack.slices] for stacks, _ in batch for stack in stacks]
            pieces = [list(stack.slices) for stacks, _ in batch for stack in stacks]
            places = [
                pair for some, targets in zip(pieces, tensors, strict=True) for pair in zip(some, targets, strict=True)
            ]
            read_weights(plan_reads(places, self._checkpoint), self._device, advance)
            del places
            for stacks, place in batch:
                place([self._stacked(stack, tensors.pop(0)) for stack in stacks])

    def _part(self, piece: TensorSlice) -> QuantisedSlice | TensorSlice:
        assert self._quantisation is not None
        scheme = self._quantisation.scheme(piece.name.removesuffix(".weight"))
        return piece if scheme is None else plan_slice(piece, scheme, self._checkpoint)

    def _stored_bytes(self, stack: StackedWeight) -> int:
        return sum(math.prod(piece.size) * self._dtype_of(piece).itemsize for piece in stack.slices)

    def _dtype_of(self, piece: TensorSlice) -> torch.dtype:
        """A packed tensor is read as it is; others become `dtype` on the way."""
        return self._checkpoint.locate(piece).dtype if piece.dtypes else self._dtype

    def _batches(self) -> Iterator[list[tuple[list[StackedWeight], Callable[[list[Weight]], None]]]]:
        batch, size = [], 0
        while self._planned:
            batch.append(self._planned.pop(0))
            size += sum(self._stored_bytes(stack) for stack in batch[-1][0])
            if size >= BATCH_BYTES or not self._planned:
                yield batch
                batch, size = [], 0

    def _reserve(self, piece: TensorSlice) -> Tensor:
        return torch.empty(piece.size, dtype=self._dtype_of(piece), device=self._device)

    def _stacked(self, stack: StackedWeight, tensors: list[Tensor]) -> Weight:
        """One weight of its parts; `tensors`, in the order of `slices`, is emptied."""
        parts: list[Weight] = []
        for part in stack.parts:
            if isinstance(part, TensorSlice):
                parts.append(tensors.pop(0))
            else:
                parts.append(part.weight({name: tensors.pop(0) for name in part.parts}))
        return stack_weights(parts, stack.inputs, self._dtype)
