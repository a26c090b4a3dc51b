"""One shard from plans to tokens: transformers' greedy tokens, and streams that depend on the request alone."""

import pytest
import torch
from plan_builder import PlanBuilder
from tiny_models import VOCAB_SIZE, load_reference, make_tiny_model

from raytroupe.actors.shard import Shard
from raytroupe.actors.shard_config import ShardConfig
from raytroupe.cluster.errors import CheckpointError
from raytroupe.cluster.request import SamplingParams
from raytroupe.cluster.step import NULL_BLOCK
from raytroupe.kernels import native_library
from raytroupe.kernels.native_library import UNPACKING_INSTRUCTION_SETS, instruction_set

BLOCK_SIZE, NUM_BLOCKS, SLOTS = 8, 400, 32
GREEDY = SamplingParams(temperature=0.0)

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def shard(folder):
    return make_shard(folder)


def make_shard(folder, max_model_len: int = 160) -> Shard:
    shard = Shard(
        ShardConfig(
            folder=folder,
            dtype="float32",
            device="cpu",
            block_size=BLOCK_SIZE,
            max_num_seqs=SLOTS,
            max_model_len=max_model_len,
            max_num_batched_tokens=512,
        )
    )
    shard.connect()
    shard.load()
    shard.allocate(NUM_BLOCKS)
    return shard


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_the_shortest_context_holds_one_prompt_token_and_one_answer(folder, shard):
    tokens = []
    for one in (make_shard(folder, max_model_len=2), shard):
        driver = Driver(one)
        driver.add(0, [5], SamplingParams(temperature=0.0))
        driver.step({0: 1})
        tokens.append(driver.tokens[0])
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 1


class Driver:
    """Runs steps on a shard, one after another."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.builder = PlanBuilder(BLOCK_SIZE, NUM_BLOCKS, self_feeding=True)
        self.tokens = self.builder.tokens
        self.add = self.builder.add
        self.logprobs = []

    def step(self, counts: dict[int, int]) -> None:
        plan = self.builder.step(counts)
        result = self._shard.run(plan)
        assert 0 < result.model_seconds <= result.total_seconds
        self.builder.take(plan, result)
        self.logprobs.append(result.logprobs)

    def decode(self, slots, steps: int) -> None:
        for _ in range(steps):
            self.step(dict.fromkeys(slots, 1))


def test_greedy_tokens_of_a_mixed_batch_equal_transformers(folder, shard):
    model = load_reference(folder)
    prompts = {0: prompt(5, 1), 1: prompt(63, 2), 2: prompt(40, 3)}
    expected = {}
    for slot, tokens in prompts.items():
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([tokens]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        expected[slot] = output[0, len(tokens) :].tolist()

    driver = Driver(shard)
    for slot, tokens in prompts.items():
        driver.add(slot, tokens, GREEDY)
    driver.step({0: 5, 1: 30})
    driver.step({0: 1, 1: 1, 2: 17})
    driver.step({0: 1, 1: 32, 2: 23})
    driver.decode([2, 0, 1], 61)
    driver.decode([1, 2], 2)
    assert dict(driver.tokens) == expected


SAMPLED = SamplingParams(
    temperature=1.1,
    top_p=0.95,
    top_k=40,
    seed=12345678901234567890,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    logprobs=3,
)


def alone(shard: Shard, tokens: list[int], sampling: SamplingParams, steps: int) -> list[int]:
    driver = Driver(shard)
    driver.add(0, tokens, sampling)
    driver.step({0: len(tokens)})
    driver.decode([0], steps - 1)
    return driver.tokens[0]


def test_a_seeded_request_gives_the_same_tokens_alone_and_in_a_full_batch(shard):
    tokens = prompt(30, 7)
    expected = alone(shard, tokens, SAMPLED, 40)
    assert len(set(expected)) > 10

    driver = Driver(shard)
    others = [SamplingParams(temperature=0.1 * i, seed=i, top_k=i % 5, min_p=0.01 * (i % 3)) for i in range(SLOTS)]
    for slot in range(SLOTS - 1):
        driver.add(slot, prompt(3 + slot % 11, slot), others[slot])
    driver.step({slot: 3 + slot % 11 for slot in range(SLOTS - 1)})
    driver.add(SLOTS - 1, tokens, SAMPLED)
    driver.step({**dict.fromkeys(range(SLOTS - 1), 1), SLOTS - 1: 13})
    driver.step({**dict.fromkeys(range(SLOTS - 1), 1), SLOTS - 1: 17})
    driver.decode(range(SLOTS), 39)
    assert driver.tokens[SLOTS - 1] == expected


@pytest.mark.parametrize("known", [1, 17, 39])
def test_a_seeded_request_goes_on_the_same_after_preemption_or_elsewhere(shard, known):
    tokens = prompt(30, 7)
    expected = alone(shard, tokens, SAMPLED, 40)

    driver = Driver(shard)
    driver.add(3, tokens + expected[:known], SAMPLED, prompt_len=len(tokens))
    driver.step({3: len(tokens) + known})
    driver.decode([3], 40 - known - 1)
    assert expected[:known] + driver.tokens[3] == expected


def test_min_tokens_and_bias_shape_the_stream(shard):
    tokens = prompt(10, 9)
    plain = alone(shard, tokens, GREEDY, 8)
    unwanted = plain[0]
    masked = alone(
        shard, tokens, SamplingParams(temperature=0.0, min_tokens=5, stop_token_ids=(unwanted,), max_tokens=8), 8
    )
    assert unwanted not in masked[:5]
    biased = alone(shard, tokens, SamplingParams(temperature=0.0, logit_bias={77: 1e4}), 8)
    assert biased == [77] * 8
    fresh = alone(shard, tokens, SamplingParams(temperature=0.0, presence_penalty=1e6), 8)
    assert len(set(fresh)) == 8


def test_log_probabilities_are_the_models_own(folder, shard):
    tokens = prompt(20, 11)
    driver = Driver(shard)
    driver.add(0, tokens, SamplingParams(temperature=0.0, logit_bias={5: 1e4}, logprobs=4))
    driver.add(1, tokens, GREEDY)
    driver.step({0: 20, 1: 20})
    report, nothing = driver.logprobs[0]
    with torch.inference_mode():
        expected = load_reference(folder)(torch.tensor([tokens])).logits[0, -1].log_softmax(0)
    assert nothing is None
    assert driver.tokens[0] == [5]
    assert report.chosen == pytest.approx(expected[5].item(), abs=1e-4)
    top = expected.topk(4)
    assert [token for token, _ in report.top] == top.indices.tolist()
    assert [value for _, value in report.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    driver.decode([1], 1)
    assert driver.logprobs[1] is None


def test_warm_up_leaves_no_trace(folder):
    runner = make_shard(folder)._runner
    table = runner._table
    assert not table.tokens.any()
    assert (table.block_tables == NULL_BLOCK).all()
    assert not any(table.num_blocks)
    keys, values, _ = runner._kv_cache.layer(0)
    assert not keys[:, 1:].any()
    assert not values[:, 1:].any()


def test_progress_of_loading_and_memory_are_reported(tmp_path):
    # Widths of whole groups: nothing is filled up for the compiled products.
    folder = make_tiny_model("llama", tmp_path, hidden_size=256, head_dim=16, intermediate_size=512, vocab_size=640)
    shard = Shard(ShardConfig(folder=folder, dtype="float32", device="cpu"))
    shard.connect()
    seen = []
    shard.load(lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    memory = shard.memory()
    # Norms and biases are not counted.
    assert 0.9 * seen[-1][1] <= memory.weights <= seen[-1][1]
    assert 0 < memory.free <= memory.total
    shard.close()


def test_bfloat16_weights_take_less_than_the_checkpoint_where_they_are_compressed(tmp_path):
    folder = make_tiny_model("llama3", tmp_path / "wide", hidden_size=256, intermediate_size=512, vocab_size=640)
    sizes = {}
    for dtype in ("bfloat16", "float32"):
        shard = Shard(ShardConfig(folder=folder, dtype=dtype, device="cpu"))
        shard.connect()
        shard.load()
        sizes[dtype] = shard.memory().weights
        shard.close()
    compressed = native_library.is_built() and instruction_set() in UNPACKING_INSTRUCTION_SETS
    ratio = sizes["bfloat16"] / (sizes["float32"] / 2)
    assert 0.7 < ratio < 0.85 if compressed else ratio == 1


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json|nowhere"):
        Shard(ShardConfig(folder=tmp_path / "nowhere"))
