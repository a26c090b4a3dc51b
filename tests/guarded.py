"""Matrices inside larger ones whose margins show whether anything was written or read beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from raytroupe.kernels.native_kernels import NativeKernels
from raytroupe.kernels.program import CACHE_LINE

MARGIN = 3
SENTINEL = -12345.0
WATCHED = 0xA5
"""Beside a workspace, which consists of bytes."""


class Guarded:
    """A matrix [rows, width] with rows and columns around it."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, *, margin: float, inside: float) -> None:
        self._all = torch.full((rows + 2 * MARGIN, width + 2 * MARGIN), margin, dtype=dtype)
        self._before = self._all.clone()
        self.inside = self._all[MARGIN : MARGIN + rows, MARGIN : MARGIN + width]
        self.inside.fill_(inside)

    def assert_margins(self) -> None:
        """Nothing was written beside the matrix."""
        rows, width = self.inside.shape
        now = self._all.clone()
        now[MARGIN : MARGIN + rows, MARGIN : MARGIN + width] = self._before[
            MARGIN : MARGIN + rows, MARGIN : MARGIN + width
        ]
        assert torch.equal(now, self._before), "something was written beside the matrix"


def surrounded_by_nan(x: Tensor) -> Tensor:
    """x as a view whose rows lie apart; what is read beside it makes a result NaN."""
    guarded = Guarded(*x.shape, x.dtype, margin=torch.nan, inside=0.0)
    return guarded.inside.copy_(x)


class GuardedKernels(NativeKernels):
    """Results lie in guarded matrices that are NaN before; `check` looks at all since the last check."""

    def __init__(self) -> None:
        super().__init__()
        self._guarded: list[Guarded] = []
        self._workspaces: list[Tensor] = []

    def temporary(self, like: Tensor, width: int, dtype: torch.dtype, *, spread: bool = False) -> Tensor:
        """See `NativeKernels`."""
        guarded = Guarded(len(like), width, dtype, margin=SENTINEL, inside=torch.nan)
        self._guarded.append(guarded)
        return guarded.inside

    def kept(self, like: Tensor, width: int) -> Tensor:
        """See `NativeKernels`."""
        return self.temporary(like, width, torch.float32)

    def workspace(self, like: Tensor, row_bytes: int) -> Tensor:
        """See `NativeKernels`; a cache line before and one behind are watched."""
        memory = super().workspace(like, row_bytes)
        whole = torch.full((len(memory) + 2 * CACHE_LINE,), WATCHED, dtype=torch.uint8)
        self._workspaces.append(whole)
        return whole[CACHE_LINE:-CACHE_LINE]

    def check(self) -> None:
        """The margins are as they were."""
        assert self._guarded, "nothing was computed"
        for guarded in self._guarded:
            guarded.assert_margins()
        for whole in self._workspaces:
            assert (whole[:CACHE_LINE] == WATCHED).all(), "something was written before the workspace"
            assert (whole[-CACHE_LINE:] == WATCHED).all(), "something was written behind the workspace"
        self._guarded.clear()
        self._workspaces.clear()
