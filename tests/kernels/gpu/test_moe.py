import pytest
import torch

from raytroupe.kernels import moe as reference
from raytroupe.kernels.gpu import expert_sort
from raytroupe.kernels.gpu.expert_sort import max_blocks, sort_by_expert
from raytroupe.kernels.gpu.moe import GroupedConfig, TritonExperts, block_rows, candidates, grouped_linear
from raytroupe.kernels.gpu.routing import route
from raytroupe.kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")


@pytest.mark.launches("route_kernel")
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 1, 1), (3, 5, 1), (4, 5, 5), (2, 128, 8), (2, 200, 6)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_is_the_reference(tokens, experts, chosen, normalize, dtype, generator):
    # Distinct also as bfloat16, so that the reference's order is the only one.
    logits = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)]).to(dtype) / 32
    weights, ids = route(logits, chosen, normalize)
    expected_weights, expected_ids = reference.route(logits, chosen, normalize)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.launches("route_kernel")
def test_of_equal_experts_the_one_of_the_lower_id_is_chosen():
    logits = torch.tensor([[1.0, 2.0, 0.0, 2.0, 1.0], [0.0] * 5])
    _, ids = route(logits, 3, True)
    assert ids.tolist() == [[1, 3, 0], [0, 1, 2]]


@pytest.mark.launches("route_kernel")
def test_nan_stays_in_its_row_and_ids_are_experts():
    logits = torch.zeros(4, 6)
    logits[0, 2] = torch.nan
    logits[1, 4] = torch.inf
    logits[2] = -torch.inf
    weights, ids = route(logits, 4, True)
    assert weights[:3].isnan().all()
    assert weights[3].tolist() == [0.25] * 4
    assert ids.min() >= 0
    assert ids.max() < 6
    assert all(len(set(row)) == 4 for row in ids.tolist())


def check_order(ids, num_experts, block_m):
    """What `sort_by_expert` promises."""
    order = sort_by_expert(ids, num_experts, block_m)
    flat = ids.flatten().tolist()
    blocks, experts = [], []
    for expert in range(num_experts):
        mine = [index for index, id in enumerate(flat) if id == expert]
        for start in range(0, len(mine), block_m):
            block = mine[start : start + block_m]
            blocks.append(block + [len(flat)] * (block_m - len(block)))
            experts.append(expert)
    assert order.max_blocks == max_blocks(len(flat), num_experts, block_m) >= len(blocks)
    assert order.block_experts.tolist() == experts + [-1] * (order.max_blocks - len(blocks))
    assert order.assignments.view(-1, block_m)[: len(blocks)].tolist() == blocks


@pytest.mark.launches("sort_by_expert_kernel")
@pytest.mark.parametrize(("tokens", "chosen", "num_experts"), [(1, 1, 1), (1, 3, 5), (40, 2, 5), (7, 4, 130)])
@pytest.mark.parametrize("block_m", [16, 64])
def test_assignments_are_sorted_by_expert(tokens, chosen, num_experts, block_m, generator):
    ids = torch.rand(tokens, num_experts, generator=generator).topk(chosen).indices
    check_order(ids.int(), num_experts, block_m)
    check_order(ids, num_experts, block_m)


@pytest.mark.launches("sort_by_expert_kernel")
def test_all_tokens_may_choose_the_same_expert_and_blocks_may_be_full():
    for expert in (0, 2, 3):
        check_order(torch.full((32, 1), expert), 4, 16)
    assert max_blocks(32, 1, 16) == 2
    assert max_blocks(8, 128, 16) == 8


@pytest.mark.launches("count_experts_kernel", "sort_by_expert_kernel")
def test_many_assignments_are_counted_first_and_sorted_piece_by_piece(generator, monkeypatch):
    monkeypatch.setattr(expert_sort, "_BLOCK", 32)
    monkeypatch.setattr(expert_sort, "_COUNT_INSIDE", 64)
    check_order(torch.randint(6, (50, 3), generator=generator), 7, 16)
    check_order(torch.zeros(99, 1, dtype=torch.int64), 3, 16)


def make_experts(generator, num_experts, hidden, width, dtype):
    def weight(*shape):
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype)

    return weight(num_experts, 2 * width, hidden), weight(num_experts, hidden, width)


EXPERT_LAUNCHES = pytest.mark.launches("sort_by_expert_kernel", "grouped_linear_kernel", "sum_experts_kernel")


@EXPERT_LAUNCHES
@pytest.mark.parametrize(
    ("tokens", "num_experts", "chosen", "hidden", "width"),
    [
        (1, 5, 2, 40, 24),
        (7, 5, 1, 32, 64),  # one expert per token
        (19, 2, 2, 64, 33),  # both experts for all tokens, blocks of 32 rows
        (3, 20, 4, 33, 40),  # most experts without tokens
    ],
)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_the_reference(tokens, num_experts, chosen, hidden, width, activation, dtype, generator):
    gate_up, down = make_experts(generator, num_experts, hidden, width, dtype)
    x = torch.randn(tokens, hidden + 3, generator=generator).to(dtype)[:, 1 : hidden + 1]
    weights, ids = reference.route(torch.randn(tokens, num_experts, generator=generator), chosen, True)
    kernels = TorchKernels(CPU, dtype)
    expected = kernels.experts(gate_up.clone(), down.clone(), activation)(x, weights, ids)
    out = TritonExperts(gate_up, down, activation)(x, weights, ids.int())
    # The reference rounds more often, and to bfloat16 every partial sum.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(out, expected, **tolerance)
    assert torch.equal(out, TritonExperts(gate_up, down, activation)(x, weights, ids.int()))


@EXPERT_LAUNCHES
def test_all_tokens_on_one_expert_among_many(generator):
    gate_up, down = make_experts(generator, 6, 32, 32, torch.float32)
    x, weights = torch.randn(40, 32, generator=generator), torch.rand(40, 1, generator=generator)
    ids = torch.full((40, 1), 5)
    expected = TorchKernels(CPU, torch.float32).experts(gate_up.clone(), down.clone(), "silu")(x, weights, ids)
    torch.testing.assert_close(TritonExperts(gate_up, down, "silu")(x, weights, ids), expected, rtol=1e-5, atol=1e-5)


@EXPERT_LAUNCHES
def test_a_broken_token_does_not_touch_the_others(generator):
    gate_up, down = make_experts(generator, 3, 32, 32, torch.float32)
    x, logits = torch.randn(5, 32, generator=generator), torch.randn(5, 3, generator=generator)
    experts = TritonExperts(gate_up, down, "silu")
    whole = experts(x, *route(logits, 2, True))
    x[1], logits[1] = torch.nan, torch.nan
    broken = experts(x, *route(logits, 2, True))
    assert broken[1].isnan().all()
    others = [0, 2, 3, 4]
    assert torch.equal(broken[others], whole[others])


@pytest.mark.launches("grouped_linear_kernel")
@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize("gated", [False, True])
def test_every_candidate_computes_the_product(block_m, gated, generator):
    num_experts, inputs, outputs, assignments = 3, 64, 48, 21
    weight = torch.randn(num_experts, outputs * (2 if gated else 1), inputs, generator=generator) / 8
    x = torch.randn(assignments, inputs, generator=generator)
    ids = torch.randint(num_experts, (assignments, 1), generator=generator)
    order = sort_by_expert(ids, num_experts, block_m)
    expected = torch.stack([weight[expert] @ row for expert, row in zip(ids[:, 0], x, strict=True)])
    if gated:
        expected = torch.nn.functional.silu(expected[:, :outputs]) * expected[:, outputs:]
    for candidate in candidates(block_m, torch.float32, gated=gated):
        out = torch.full((assignments, outputs), torch.nan)
        grouped_linear(x, weight, out, order, candidate, activation=0 if gated else None)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.launches("grouped_linear_kernel")
def test_groups_that_are_not_full_reach_every_block(generator):
    weight, x = torch.randn(5, 40, 32, generator=generator), torch.randn(90, 32, generator=generator)
    ids = torch.randint(5, (90, 1), generator=generator)
    order = sort_by_expert(ids, 5, 16)
    expected = torch.stack([weight[expert] @ row for expert, row in zip(ids[:, 0], x, strict=True)])
    for group in (1, 3, 4, 64):
        out = torch.full((90, 40), torch.nan)
        grouped_linear(x, weight, out, order, GroupedConfig(16, 32, group, 4, 2))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_blocks_grow_with_the_assignments_of_an_expert():
    assert [block_rows(count, 8) for count in (1, 128, 129, 256, 257, 2048, 2049, 10**6)] == [
        16, 16, 32, 32, 64, 64, 128, 128,
    ]  # fmt: skip
