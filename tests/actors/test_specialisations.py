"""Nothing is compiled while serving: the warm-up launches every specialisation of every kernel that requests can need.

Launches are noted and not made, so what is computed is nonsense; shapes and arguments are those of a real step.
"""

import random

import pytest
import torch
from plan_builder import PlanBuilder
from quantised_checkpoints import compressed, quantise
from tiny_models import VOCAB_SIZE, make_tiny_model
from triton.runtime.interpreter import InterpretedFunction

from raytroupe.actors.shard import Shard
from raytroupe.actors.shard_config import ShardConfig
from raytroupe.cluster.request import SamplingParams
from raytroupe.kernels.backend import CHOICE

BLOCK_SIZE, MAX_MODEL_LEN = 16, 400
OPTIONS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 0.0, "repetition_penalty": 1.2, "logprobs": 5},
    {"temperature": 0.5, "top_k": 7, "logit_bias": {3: 1.0}, "logprobs": 0},
)


def specialised(argument):
    """What Triton compiles for: a pointer's dtype and alignment; whether an integer is 1, a multiple of 16, or wide."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int) and not isinstance(argument, bool):
        return argument == 1, argument % 16 == 0, abs(argument) >= 2**31
    return type(argument)


@pytest.fixture
def launches(monkeypatch):
    """The set of (kernel, specialisation) that were launched."""
    seen = set()

    def note(self, *arguments, grid, warmup, **constants):
        general = self.kwargs.get("do_not_specialize") or ()
        kinds = tuple(
            "general" if name in general else specialised(argument)
            for name, argument in zip(self.arg_names, arguments, strict=False)
        )
        seen.add((self.fn.__name__, kinds, tuple(sorted((name, str(value)) for name, value in constants.items()))))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # nothing is computed, and indices must be indices
    monkeypatch.setenv(CHOICE, "triton")
    return seen


def check(folder, launches, max_num_seqs, max_tokens, **options):
    """Serve random requests: nothing is launched that the warm-up did not launch."""
    shard = Shard(
        ShardConfig(
            folder=folder, dtype="float32", device="cpu", block_size=BLOCK_SIZE, max_num_seqs=max_num_seqs,
            max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=max_tokens, **options,
        )
    )  # fmt: skip
    shard.connect()
    shard.load()
    shard.allocate(1 + max_num_seqs * MAX_MODEL_LEN // BLOCK_SIZE)
    warm = set(launches)
    assert len(warm) > 15
    numbers = random.Random(4)
    builder = PlanBuilder(BLOCK_SIZE, 1 + max_num_seqs * MAX_MODEL_LEN // BLOCK_SIZE, self_feeding=True)
    known: dict[int, int] = {}  # slot → tokens of its prompt that are still to be computed
    for step in range(300):
        counts: dict[int, int] = {}
        budget = numbers.choice([max_tokens, numbers.randint(1, max_tokens)])
        for slot in numbers.sample(range(max_num_seqs), numbers.randint(1, max_num_seqs)):
            if slot not in known or numbers.random() < 0.02:
                length = numbers.choice([1, numbers.randint(2, 200), MAX_MODEL_LEN - 60])
                options = SamplingParams(seed=slot, max_tokens=99, **numbers.choice(OPTIONS))
                builder.add(slot, [numbers.randrange(VOCAB_SIZE) for _ in range(length)], options)
                known[slot] = length
            count = min(budget, max(1, known[slot]))
            if count and builder._known[slot] < MAX_MODEL_LEN - 2:
                counts[slot] = count
                known[slot] -= count
                budget -= count
        if counts:
            shard.run(builder.step(counts))
        new = launches - warm
        assert not new, f"step {step} {counts}: {sorted({(name, constants) for name, _, constants in new})}"


@pytest.mark.parametrize(("max_num_seqs", "max_tokens"), [(6, 100), (40, 300)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_moe"])
def test_the_warm_up_launches_all_that_requests_need(family, max_num_seqs, max_tokens, tmp_path, launches):
    check(make_tiny_model(family, tmp_path), launches, max_num_seqs, max_tokens)


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_so_it_does_with_a_cache_of_8_bits(stored, tmp_path, launches):
    check(make_tiny_model("gemma2", tmp_path), launches, 6, 100, kv_cache_dtype=stored)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", compressed("pack-quantized", num_bits=4, group_size=32, strategy="group")),
        ("llama", compressed("int-quantized", activations=True, num_bits=8, strategy="channel")),
        ("mixtral", compressed("pack-quantized", num_bits=4, group_size=32, strategy="group")),
    ],
    ids=["int4", "int8", "int4 experts"],
)
def test_the_warm_up_launches_all_that_a_quantised_model_needs(family, form, tmp_path, launches):
    folder, _ = quantise(family, tmp_path, form, num_hidden_layers=2)
    check(folder, launches, 40, 300)
    kernels = {name for name, _, _ in launches}
    assert kernels & {"few_rows_quantised_kernel", "eight_bit_linear_kernel"}
    assert ("grouped_quantised_kernel" in kernels) == (family == "mixtral")
