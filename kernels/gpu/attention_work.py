"""Who computes which part of a step's attention, decided on the host from the rows' lengths alone.

A tile is up to `tile_tokens` query tokens of one row with all query heads of one KV head: with grouped queries a decode
row still fills a matrix unit. A tile whose row is long is cut along the keys into items, so that all programs have
about equally much to read however unequal the rows are (flash-decoding, arXiv:2311.01282); a second kernel merges the
partial results.

    row 0, 1 token    [■■■■■■■■|■■■■■■■■|■■■■■■■■|■■■■■■■■]      4 items, merged
    row 1, 1 token    [■■■■]                                      1 item, written directly
    row 2, 3 tiles    [■■■■■■■■] [■■■■■■■■■] [■■■■■■■■■■]        3 items, each up to its last token's own key

Arrays have a row of int32 per item, padded with zeros where a fixed number is wanted: an item without tokens is none.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

ITEM_FIELDS = 8
"""First token, tokens, row of the block tables, position of the first token, first key, end of keys, partial or -1, and
zero."""
MERGE_FIELDS = 4
"""Token, first partial, partials, token's index in its tile."""
MIN_ITEM_KEYS = 128
"""Shorter items cost more in launching and merging than they win."""


@dataclasses.dataclass(frozen=True, slots=True)
class HostWork:
    """Items and merges of the rows of one kind, before they are uploaded."""

    items: NDArray[np.int32]
    """[items, ITEM_FIELDS], longest first."""
    merges: NDArray[np.int32]
    """[merges, MERGE_FIELDS]: the tokens of tiles that were cut."""


def max_items(tiles: int, target: int) -> int:
    """No work for so many tiles has more items."""
    return tiles + target


def max_partials(target: int) -> int:
    """No work has more partial results: only tiles longer than an equal share are cut, each into at most twice as many
    items as it has shares."""
    return 2 * target


def plan_work(
    first_tokens: NDArray[np.int64],
    counts: NDArray[np.int64],
    contexts: NDArray[np.int64],
    table_rows: NDArray[np.int64],
    *,
    tile_tokens: int,
    tile_keys: int,
    window: int | None,
    target: int,
) -> HostWork:
    """Cut rows into items.

    Args:
        first_tokens: [R] index of every row's first token among the step's.
        counts: [R] query tokens, at least 1.
        contexts: [R] keys, those of the query tokens included.
        table_rows: [R] row of the block tables.
        tile_tokens: query tokens of a tile.
        tile_keys: keys that a program reads at a time; items begin at multiples of it.
        window: a token sees this many tokens, itself included; None: all before it.
        target: items that keep the device busy; long rows are cut until there are about so many.
    """
    tiles_per_row = -(-counts // tile_tokens)
    row = np.repeat(np.arange(len(counts)), tiles_per_row)
    done = tile_tokens * (np.arange(len(row)) - np.repeat(np.cumsum(tiles_per_row) - tiles_per_row, tiles_per_row))
    tokens = np.minimum(tile_tokens, counts[row] - done)
    position = contexts[row] - counts[row] + done
    end = position + tokens
    begin = np.maximum(0, position + 1 - window) // tile_keys * tile_keys if window else np.zeros_like(end)

    lengths = -(-(end - begin) // tile_keys)  # in units of tile_keys
    share = max(-(-MIN_ITEM_KEYS // tile_keys), -(-int(lengths.sum()) // target))
    pieces = -(-lengths // share)
    length = -(-lengths // pieces)  # of the pieces of a tile, as equal as can be
    pieces = -(-lengths // length)

    tile = np.repeat(np.arange(len(row)), pieces)
    first_piece = np.cumsum(pieces) - pieces
    piece = np.arange(len(tile)) - first_piece[tile]
    item_begin = begin[tile] + piece * length[tile] * tile_keys
    item_end = np.minimum(end[tile], item_begin + length[tile] * tile_keys)
    cut = pieces > 1
    first_partial = np.cumsum(np.where(cut, pieces, 0)) - np.where(cut, pieces, 0)
    items = np.zeros((len(tile), ITEM_FIELDS), dtype=np.int32)
    items[:, 0] = (first_tokens[row] + done)[tile]
    items[:, 1] = tokens[tile]
    items[:, 2] = table_rows[row][tile]
    items[:, 3] = position[tile]
    items[:, 4] = item_begin
    items[:, 5] = item_end
    items[:, 6] = np.where(cut[tile], first_partial[tile] + piece, -1)
    order = np.argsort(item_begin - item_end, kind="stable")  # a short item at the end leaves no program alone for long

    cut_tiles = np.flatnonzero(cut)
    of_tile = np.repeat(cut_tiles, tokens[cut_tiles])
    index = np.arange(len(of_tile)) - np.repeat(np.cumsum(tokens[cut_tiles]) - tokens[cut_tiles], tokens[cut_tiles])
    merges = np.empty((len(of_tile), MERGE_FIELDS), dtype=np.int32)
    merges[:, 0] = (first_tokens[row] + done)[of_tile] + index
    merges[:, 1] = first_partial[of_tile]
    merges[:, 2] = pieces[of_tile]
    merges[:, 3] = index
    return HostWork(items[order], merges)


def padded(rows: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """`rows` with zero rows behind, `count` in all."""
    assert len(rows) <= count
    result = np.zeros((count, rows.shape[1]), dtype=np.int32)
    result[: len(rows)] = rows
    return result
