"""The host's side of `attention.py`: tile sizes, work for every window, workspace, launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from ..attention_metadata import AttentionMetadata
from .attention import merge_kernel, paged_attention_kernel
from .attention_work import ITEM_FIELDS, MERGE_FIELDS, max_items, max_partials, padded, plan_work
from .tuning import dtype_name, load_tuning

_LOG2_E = 1.4426950408889634
_MIN_ROWS = 16
"""Of a matrix unit's operand."""
_PARTS = 16
"""Parts of a row that are merged at a time."""
_AMPERE_SHARED_MEMORY = 163 * 1024
"""Bytes that a program may have on an A100; a Hopper GPU gives 227 KiB."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """What a program works on, and how many there are."""

    rows: int
    """Query rows: tokens times heads of a group."""
    keys: int
    """Keys at a time."""
    warps: int
    stages: int
    """Key tiles that are being loaded or worked on, in the compiler's count."""
    programs: int
    """Per multiprocessor, that long rows are cut for: several run at once, and so many in turn that the last ones do
    not leave the device idle."""


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionShape:
    """The heads of a shard."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What programs do for the rows of one kind in layers with one window; on the device."""

    items: Tensor
    """[items, ITEM_FIELDS] int32."""
    merges: Tensor
    """[merges, MERGE_FIELDS] int32."""


KINDS = ("decode", "prefill")
"""Rows with one query token, and the others; each kind has its own tiles."""

StepWork = Mapping[tuple[int | None, str], Work]
"""By window and kind; a kind without rows is missing."""


def choose_tiles(shape: AttentionShape, itemsize: int, kind: str, shared_memory: int) -> Tiles:
    """Where nothing was measured: the largest tiles that need neither spilled registers nor more shared memory than
    there is (`deploy/bench/gpu/compile_report.py` shows both).

    Args:
        itemsize: bytes of a query's element.
        kind: one of `KINDS`.
        shared_memory: bytes that one program may have.
    """
    dims = triton.next_power_of_2(shape.head_dim)
    decode = kind == "decode"
    hopper = shared_memory > _AMPERE_SHARED_MEMORY
    if itemsize > 2:
        return fit_group(Tiles(16 if decode else 32, 32, 8, 1, 8 if decode else 2), shape)
    if decode:
        # A key tile is loaded while another waits and a third is worked on; with the block ids, which come first, the
        # compiler counts five stages.
        tiles = Tiles(16, 64, 4, 5, 8) if dims <= 128 else Tiles(16, 32, 8, 5, 8)
    else:
        tiles = Tiles(128 if dims <= 128 else 64, 64 if hopper and dims <= 128 else 32, 8, 3, 2)
    tiles = fit_group(tiles, shape)
    buffers = 2 if tiles.stages > 4 else 1
    needed = (tiles.rows + 2 * buffers * tiles.keys + tiles.rows * tiles.keys // dims) * dims * itemsize
    return tiles if needed <= shared_memory else dataclasses.replace(tiles, stages=1)


def fit_group(tiles: Tiles, shape: AttentionShape) -> Tiles:
    """With room for one token's heads at least."""
    return dataclasses.replace(tiles, rows=max(_MIN_ROWS, tiles.rows, triton.next_power_of_2(shape.group)))


def warps_for(tiles: Tiles, scaled: bool) -> int:
    """Keys that are converted on the way need twice the registers."""
    return 8 if scaled else tiles.warps


class PagedAttention:
    """The attention of one shard, with the workspace for partial results."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        num_processors: int,
        shared_memory: int,
        tiles: Tiles | None = None,
    ) -> None:
        """
        Args:
            num_processors: multiprocessors of the device.
            shared_memory: bytes that one program may have.
            tiles: to be used for everything, for tuning; None: as was measured on this kind of device, or
                `choose_tiles`.
        """
        self._tiles = tiles
        self._tuning = load_tuning(device)
        self._device, self._dtype = device, dtype
        self._processors, self._shared_memory = num_processors, shared_memory
        self._workspace: dict[tuple[AttentionShape, str], tuple[Tensor, Tensor, Tensor]] = {}

    def tiles(self, shape: AttentionShape, kind: str) -> Tiles:
        """For rows of a kind."""
        exact = {"rows": kind, "dtype": dtype_name(self._dtype)}
        tiles = self._tiles or self._tuning.find_any("attention", Tiles, exact, {"head_dim": shape.head_dim})
        if tiles is None:
            return choose_tiles(shape, self._dtype.itemsize, kind, self._shared_memory)
        return fit_group(tiles, shape)

    def target(self, shape: AttentionShape, kind: str) -> int:
        """Items that keep the device busy."""
        return max(1, self._processors * self.tiles(shape, kind).programs // shape.kv_heads)

    def host_work(
        self,
        shape: AttentionShape,
        windows: Iterable[int | None],
        counts: NDArray[np.int64],
        contexts: NDArray[np.int64],
        table_rows: NDArray[np.int64],
        decode_rows: int,
        *,
        padded_rows: int | None = None,
    ) -> dict[str, NDArray[np.int32]]:
        """A step's work as arrays to upload, from which `step_work` makes it again.

        Args:
            counts, contexts, table_rows: of all R rows, as `plan_work` takes them.
            decode_rows: the first so many rows have one query token.
            padded_rows: make arrays of a fixed size, enough for so many decode rows (and no others).
        """
        first_tokens = np.cumsum(counts) - counts
        arrays = {}
        for kind, rows in (("decode", slice(0, decode_rows)), ("prefill", slice(decode_rows, None))):
            if not len(counts[rows]):
                continue
            tiles, target = self.tiles(shape, kind), self.target(shape, kind)
            for window in windows:
                work = plan_work(
                    first_tokens[rows], counts[rows], contexts[rows], table_rows[rows],
                    tile_tokens=tiles.rows // shape.group, tile_keys=tiles.keys, window=window, target=target,
                )  # fmt: skip
                items, merges = work.items, work.merges
                if padded_rows is not None:
                    items, merges = padded(items, max_items(padded_rows, target)), padded(merges, padded_rows)
                arrays[f"{window} {kind} items"] = items.reshape(-1)
                arrays[f"{window} {kind} merges"] = merges.reshape(-1)
        return arrays

    @staticmethod
    def step_work(uploaded: Mapping[str, Tensor], windows: Iterable[int | None]) -> StepWork:
        """What `host_work` described, from the device's copies of its arrays."""
        return {
            (window, kind): Work(
                uploaded[f"{window} {kind} items"].view(-1, ITEM_FIELDS),
                uploaded[f"{window} {kind} merges"].view(-1, MERGE_FIELDS),
            )
            for window in windows
            for kind in KINDS
            if f"{window} {kind} items" in uploaded
        }

    def __call__(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        work: Callable[[AttentionShape, int | None], StepWork],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        scales: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """See `interface.Kernels.attention`."""
        tokens, heads, head_dim = query.shape
        kv_heads, _, block_size, _ = k_cache.shape
        shape = AttentionShape(heads, kv_heads, head_dim)
        assert query.stride(1) == head_dim
        assert query.stride(2) == 1
        assert block_tables.stride(1) == 1
        out = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)
        k_scales, v_scales = scales or (out, out)
        constants = {"GROUP": shape.group, "HEAD_DIM": head_dim, "DIMS": triton.next_power_of_2(head_dim)}
        step_work = work(shape, window)
        for kind in KINDS:
            part = step_work.get((window, kind))
            if part is None:
                continue
            tiles = self.tiles(shape, kind)
            partials = self._partials(shape, kind)
            paged_attention_kernel[(kv_heads, len(part.items))](
                query, k_cache, v_cache, k_scales, v_scales, out, *partials, part.items, block_tables,
                query.stride(0), block_tables.stride(0), k_cache.stride(0),
                scale * _LOG2_E if softcap is None else 2 * scale * _LOG2_E / softcap,
                0.0 if softcap is None else softcap * _LOG2_E,
                window or 0,
                **constants, ROWS=tiles.rows, KEYS=tiles.keys, BLOCK_SIZE=block_size,
                SOFTCAP=softcap is not None, WINDOW=window is not None, SCALED=scales is not None,
                PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
                num_warps=warps_for(tiles, scales is not None), num_stages=tiles.stages,
            )  # fmt: skip
            if len(part.merges):
                merge_kernel[(heads, len(part.merges))](
                    out, *partials, part.merges, **constants, ROWS=tiles.rows, PARTS=_PARTS, num_warps=4
                )
        return out.view(tokens, heads * head_dim)

    def _partials(self, shape: AttentionShape, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Sums, maxima and weights of the largest possible work; made once, because recorded graphs hold them."""
        if (shape, kind) not in self._workspace:
            rows = max_partials(self.target(shape, kind)) * shape.kv_heads * self.tiles(shape, kind).rows
            dims = triton.next_power_of_2(shape.head_dim)
            self._workspace[shape, kind] = (
                torch.empty(rows * dims, device=self._device),
                torch.empty(rows, device=self._device),
                torch.empty(rows, device=self._device),
            )
        return self._workspace[shape, kind]


class TritonPlan:
    """A step whose work was uploaded with it, or is worked out and uploaded when a layer first asks."""

    def __init__(
        self,
        metadata: AttentionMetadata,
        attention: PagedAttention,
        upload: Callable[[Mapping[str, NDArray]], dict[str, Tensor]],
    ) -> None:
        self.metadata = metadata
        self._attention = attention
        self._upload = upload
        self._work: dict[tuple[AttentionShape, int | None], StepWork] = {}

    def work(self, shape: AttentionShape, window: int | None) -> StepWork:
        """For layers with these heads and this window."""
        metadata = self.metadata
        if metadata.work is not None:
            return metadata.work
        if (shape, window) not in self._work:
            arrays = self._attention.host_work(
                shape, (window,), np.array(metadata.counts), np.array(metadata.contexts),
                np.arange(len(metadata.counts)), metadata.decode_rows,
            )  # fmt: skip
            self._work[shape, window] = self._attention.step_work(self._upload(arrays), (window,))
        return self._work[shape, window]
