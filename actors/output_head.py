"""From the last layer's hidden states to logits, for the rows that sample."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cluster.model_spec import ModelSpec
from ..kernels.interface import Kernels, Linear, Program
from .collectives import Collectives


class OutputHead:
    """The final norm, which only rows that sample pay for, and the product with the vocabulary."""

    def __init__(
        self,
        spec: ModelSpec,
        norm: Tensor,
        product: Linear,
        kernels: Kernels,
        collectives: Collectives,
        *,
        sharded: bool,
    ) -> None:
        """
        Args:
            norm: [hidden] float32.
            product: [rows, hidden] → this shard's part of the vocabulary.
            sharded: other tensor-parallel shards have the other parts.
        """
        self._spec = spec
        self._norm, self._product = norm, product
        self._kernels, self._collectives = kernels, collectives
        self._sharded = sharded
        self._scales = spec.logits_scale != 1.0 or spec.logits_softcap is not None
        self._recorded: _Recorded | None = None

    def record(self, hidden: Tensor, max_rows: int) -> None:
        """Have at most `max_rows` rows of `hidden`, the layers' buffer, go through a program from now on, where the
        kernels can: a call for each kernel costs as much as the smallest of them."""
        logits_program, likeliest_program = (self._kernels.new_program(max_rows) for _ in range(2))
        if logits_program is None or likeliest_program is None:
            return
        if self._sharded or not logits_program.can_record(self._product):
            return
        rows = torch.zeros(max_rows, dtype=torch.int64)
        with logits_program.recording():
            logits = self._project(hidden, rows)
        with likeliest_program.recording():
            tokens = self._kernels.argmax(self._project(hidden, rows))
        self._recorded = _Recorded(hidden, rows.numpy(), logits_program, logits, likeliest_program, tokens.numpy())

    def logits(self, hidden: Tensor, rows: Tensor | None) -> Tensor:
        """See `Decoder.logits`."""
        recorded = self._recorded
        if recorded is not None and rows is not None and recorded.holds(hidden, rows):
            recorded.run(recorded.logits_program, rows)
            logits = recorded.logits[: len(rows)]
        else:
            logits = self._project(hidden, rows)
        spec = self._spec
        logits = self._collectives.all_gather_last_dim(logits)[:, : spec.vocab_size]
        if spec.logits_scale != 1.0:
            logits = logits * spec.logits_scale
        if spec.logits_softcap is not None:
            logits = (logits / spec.logits_softcap).tanh_().mul_(spec.logits_softcap)
        return logits

    def likeliest(self, hidden: Tensor, rows: Tensor) -> list[int]:
        """See `Decoder.likeliest`."""
        recorded = self._recorded
        if recorded is None or self._scales or not recorded.holds(hidden, rows):
            return self._kernels.argmax(self.logits(hidden, rows)).tolist()
        recorded.run(recorded.likeliest_program, rows)
        return recorded.tokens[: len(rows)].tolist()

    def _project(self, hidden: Tensor, rows: Tensor | None) -> Tensor:
        return self._product.float32(self._kernels.rms_norm(hidden, self._norm, self._spec.norm_eps, rows=rows))


@dataclasses.dataclass(frozen=True, slots=True)
class _Recorded:
    """Two programs, and what they read and write. Between kernels that have swept the caches, torch takes fifty
    microseconds to make a view and NumPy five."""

    hidden: Tensor
    """[max tokens, hidden]."""
    rows: NDArray[np.int64]
    """[max rows]: indices into `hidden`."""
    logits_program: Program
    logits: Tensor
    """[max rows, vocab] float32."""
    likeliest_program: Program
    """The same, and then the largest of each row."""
    tokens: NDArray[np.int64]
    """[max rows]."""

    def holds(self, hidden: Tensor, rows: Tensor) -> bool:
        """Whether the programs can compute these rows of `hidden`."""
        return hidden.data_ptr() == self.hidden.data_ptr() and len(rows) <= len(self.rows)

    def run(self, program: Program, rows: Tensor) -> None:
        """Run one of the programs for these rows."""
        self.rows[: len(rows)] = rows.numpy()
        program.run_rows(len(rows))
