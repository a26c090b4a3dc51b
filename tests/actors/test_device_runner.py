"""The runner that launches ahead gives the tokens of the one that waits; its kernels run under the interpreter."""

import numpy as np
import pytest
import torch
from engine_references import family_reference
from plan_builder import PlanBuilder
from tiny_models import VOCAB_SIZE, make_tiny_model

from raytroupe.actors.decode_graphs import LARGEST, DecodeGraphs, graph_sizes, pad_rows
from raytroupe.actors.decoder import Decoder
from raytroupe.actors.device_runner import DeviceRunner
from raytroupe.actors.local_engine import LocalEngine
from raytroupe.actors.model_runner import ModelRunner
from raytroupe.actors.rehearsal import rehearse
from raytroupe.actors.shard import Shard
from raytroupe.actors.shard_config import ShardConfig
from raytroupe.actors.warm_up import batch_sizes
from raytroupe.cluster.model_spec import load_spec
from raytroupe.cluster.request import SamplingParams
from raytroupe.cluster.step import StepResult
from raytroupe.cluster.topology import ShardLayout
from raytroupe.kernels.backend import CHOICE

BLOCK_SIZE, NUM_BLOCKS, SLOTS = 8, 100, 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpu_shard(folder):
    """A shard that launches ahead; every test gives its slots to new sequences."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return make_shard(folder, "triton", monkeypatch)


def make_shard(folder, choice, monkeypatch):
    monkeypatch.setenv(CHOICE, choice)
    config = ShardConfig(
        folder=folder, dtype="float32", device="cpu", block_size=BLOCK_SIZE, max_num_seqs=SLOTS, max_model_len=64,
        max_num_batched_tokens=64,
    )  # fmt: skip
    shard = Shard(config)
    shard.connect()
    shard.load()
    shard.allocate(NUM_BLOCKS)
    return shard


def awaited(step):
    return step if isinstance(step, StepResult) else step.result()


def prompt(length, seed):
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_the_same_tokens_as_the_runner_that_waits(folder, gpu_shard, monkeypatch):
    """Prompts, chunks, decode steps of several sizes, every option, slots that change hands; two steps in flight."""
    sampled = SamplingParams(
        temperature=0.8, top_p=0.9, top_k=20, seed=5, repetition_penalty=1.3, frequency_penalty=0.2, logprobs=3,
        logit_bias={7: 2.0}, max_tokens=50,
    )  # fmt: skip
    results = {}
    for choice, kind in (("torch", ModelRunner), ("triton", DeviceRunner)):
        shard = gpu_shard if choice == "triton" else make_shard(folder, choice, monkeypatch)
        assert isinstance(shard._runner, kind)
        builder = PlanBuilder(BLOCK_SIZE, NUM_BLOCKS, self_feeding=True)
        plans = []
        builder.add(0, prompt(9, 0), GREEDY)
        builder.add(1, prompt(21, 1), sampled)
        plans += [builder.step({0: 9, 1: 10}), builder.step({0: 1, 1: 11})]
        plans += [builder.step({0: 1, 1: 1}) for _ in range(4)]
        builder.add(2, prompt(8, 2), GREEDY)
        builder.add(5, prompt(7, 3), sampled)
        plans += [builder.step({0: 1, 1: 1, 2: 8, 5: 7})]
        plans += [builder.step({0: 1, 2: 1, 5: 1}) for _ in range(10)]
        builder.add(0, prompt(1, 4), sampled)
        plans += [builder.step({0: 1, 1: 1, 2: 1, 5: 1}) for _ in range(2)]
        launched, results[choice] = [], []
        for plan in plans:
            launched.append(shard.launch(plan))
            if len(launched) == 2:
                results[choice].append(awaited(launched.pop(0)))
        results[choice].append(awaited(launched.pop()))
    for mine, theirs in zip(results["triton"], results["torch"], strict=True):
        assert (mine.step, mine.tokens) == (theirs.step, theirs.tokens)
        assert (mine.logprobs is None) == (theirs.logprobs is None)
        for one, other in zip(mine.logprobs or [], theirs.logprobs or [], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
                assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_steps_without_a_sampled_row_and_tokens_outside_of_the_vocabulary(gpu_shard):
    shard = gpu_shard
    builder = PlanBuilder(BLOCK_SIZE, NUM_BLOCKS, self_feeding=True)
    builder.add(0, [VOCAB_SIZE + 5, -3, 4, 5], GREEDY)
    first = shard.run(builder.step({0: 3}))
    assert first.tokens == []
    [token] = shard.run(builder.step({0: 1})).tokens
    builder.add(1, [VOCAB_SIZE - 1, 0, 4, 5], GREEDY)
    assert shard.run(builder.step({1: 4})).tokens == [token]


def test_the_largest_step_leaves_no_trace(gpu_shard):
    shard = gpu_shard
    shard._runner.profile()
    builder = PlanBuilder(BLOCK_SIZE, NUM_BLOCKS, self_feeding=True)
    builder.add(0, prompt(9, 0), GREEDY)
    assert len(shard.run(builder.step({0: 9})).tokens) == 1


@pytest.mark.parametrize(
    ("family", "tp_size", "stored"), [("gemma2", 1, "auto"), ("qwen3_moe", 2, "auto"), ("gemma2", 1, "int8")]
)
def test_a_rehearsal_needs_no_weights_and_no_peers(family, tp_size, stored, tmp_path, monkeypatch):
    folder = make_tiny_model(family, tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    layout = ShardLayout(tp_rank=tp_size - 1, tp_size=tp_size, pp_rank=0, pp_size=1)
    config = ShardConfig(
        folder=folder, layout=layout, dtype="float32", device="cpu", max_num_seqs=2, max_model_len=32,
        max_num_batched_tokens=16, kv_cache_dtype=stored,
    )  # fmt: skip
    spec = load_spec(folder)
    windows = []
    forward = Decoder.forward
    monkeypatch.setattr(
        Decoder, "forward", lambda self, *arguments: windows.append(len(self._layers)) or forward(self, *arguments)
    )
    rehearse(spec, config, torch.device("cpu"), torch.float32)
    assert set(windows) == {len(set(spec.layers))}
    assert len(windows) == 5 + len(batch_sizes(16)), "prompts, decode steps, a long chunk, and batches of every size"


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 64, 100, 256, 600, 4096])
def test_graph_sizes_waste_little(max_num_seqs):
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(max_num_seqs, LARGEST)
    for rows in range(1, sizes[-1] + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows <= max(7, rows // 4)


def test_a_step_takes_the_smallest_recording_that_holds_it():
    seen = []

    def function(size, inputs):
        seen.append(size)
        return inputs["rows"][:, 0] * 2

    def arrays(size):
        return {"rows": np.zeros((size, 8), np.int32)}

    graphs = DecodeGraphs([1, 2, 8], arrays, function, torch.device("cpu"))
    assert seen == [8, 2, 1]
    assert [graphs.fitting(rows) for rows in (1, 2, 3, 8, 9)] == [1, 2, 8, 8, None]
    padding = np.array([-1, 0, 1, 0, -1, 0, 0, 0], np.int32)
    rows = pad_rows(np.full((3, 8), 4, np.int32), 8, padding)
    assert rows[:, 0].tolist() == [4, 4, 4, -1, -1, -1, -1, -1]
    assert rows[:, 3].tolist() == list(range(8))
    output, inputs = graphs.run(8, {"rows": rows})
    assert torch.equal(inputs["rows"], torch.from_numpy(rows))
    assert output.tolist() == [8, 8, 8, -2, -2, -2, -2, -2]


def test_the_engine_keeps_two_steps_in_flight_and_answers_as_transformers(tmp_path_factory, monkeypatch):
    """Through scheduler, loop and executor, with a pool that is too small for all: sequences are preempted."""
    monkeypatch.setenv(CHOICE, "triton")
    reference = family_reference("qwen3", tmp_path_factory.getbasetemp() / "families")
    prompts, new_tokens = reference.prompts[:3], 4
    longest = max(len(prompt) for prompt in prompts) + new_tokens
    num_blocks = 1 + -(-longest // BLOCK_SIZE) + 3
    flights = []
    with LocalEngine(
        reference.folder, num_blocks=num_blocks, dtype="float32", device="cpu", block_size=BLOCK_SIZE,
        max_model_len=longest, max_num_seqs=3, max_num_batched_tokens=32,
    ) as engine:  # fmt: skip
        assert isinstance(engine.shard._runner, DeviceRunner)
        engine.observe = lambda result: flights.append(engine.scheduler.num_in_flight)
        completions = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=new_tokens))
        engine.scheduler.check_integrity()
        assert engine.scheduler.snapshot().blocks_held == 0
    expected = [answer[:new_tokens] for answer in reference.answers[: len(prompts)]]
    assert [completion.tokens for completion in completions] == expected
    assert max(flights) == 2, "a result is taken in and the next plans are out already"
