import pytest
import torch

from raytroupe.kernels.gpu.step import NO_SLOT, prepare, record, update


def int32(rows):
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.launches("update_kernel")
def test_pieces_of_rows_are_written_and_nothing_else():
    table = torch.full((4, 700), -1, dtype=torch.int32)
    values = torch.arange(610, dtype=torch.int32)
    update(table, values, int32([[2, 0, 0, 600], [0, 690, 600, 10]]), 600)
    assert table[2, :600].tolist() == list(range(600))
    assert table[0, 690:].tolist() == list(range(600, 610))
    assert (table == -1).sum() == 4 * 700 - 610


@pytest.mark.launches("prepare_kernel")
def test_ids_positions_and_slots_of_rows_of_any_length():
    tokens = torch.arange(3 * 600, dtype=torch.int32).view(3, 600)
    tables = int32([[3, 9, 0, 0], [5, 0, 0, 0], [0, 0, 0, 0]]).repeat(1, 20)
    before = tables.clone()
    rows = [(1, 8, 1, 0, 4), (0, 5, 9, 1, -1), (NO_SLOT, 0, 1, 10, -1), (2, 3, 500, 11, -1)]
    out = tuple(torch.full((512,), -7) for _ in range(3))
    prepare(int32([[*row, 0, 0, 0] for row in rows]), tokens, tables, 500, 8, out)
    ids, positions, slots = out
    assert ids[:12].tolist() == [608, *range(5, 14), 0, 1203]
    assert positions[:12].tolist() == [8, *range(5, 14), 0, 3]
    assert slots[:11].tolist() == [32, 29, 30, 31, *range(72, 78), 0]
    assert ids[11:511].tolist() == list(range(1203, 1703))
    assert [part[511].item() for part in out] == [-7, -7, -7]
    before[1, 1] = 4
    assert torch.equal(tables, before), "the new block is entered, and only that"


@pytest.mark.launches("record_kernel")
def test_sampled_tokens_stand_behind_their_sequences():
    tokens = torch.zeros(3, 10, dtype=torch.int32)
    rows = [[2, 4, 5, 0, -1, 0, 0, 0], [0, 0, 1, 5, 7, 0, 0, 0], [1, 0, 1, 6, -1, 0, 0, 0]]
    record(tokens, int32(rows), torch.tensor([50, 60]))
    assert tokens[2, 9] == 50
    assert tokens[0, 1] == 60
    assert tokens.sum() == 110
