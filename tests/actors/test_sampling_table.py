"""What the table says to the sampler on the device, against what it says to the one on the host."""

import numpy as np

from raytroupe.actors.sampling_table import SamplingTable
from raytroupe.cluster.request import SamplingParams
from raytroupe.kernels.philox import uniforms

VOCAB = 50
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=2**64 - 3),
    SamplingParams(temperature=0.0, logit_bias={3: 1.5, 49: -2.0, 50: 9.0}, logprobs=4, seed=5),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, logit_bias={7: 1.0}, logprobs=0),
    SamplingParams(min_tokens=4, stop_token_ids=(3, 8), presence_penalty=-1.0),
]
PROMPT_LEN = 10


def make_table() -> SamplingTable:
    """Slot i + 1 has the parameters i."""
    table = SamplingTable(len(PARAMS) + 1, VOCAB)
    for slot, params in enumerate(PARAMS, 1):
        table.set(slot, params, PROMPT_LEN)
    return table


def test_the_device_is_told_the_same_as_the_host():
    table = make_table()
    tokens = np.random.default_rng(1).integers(0, VOCAB, (len(PARAMS) + 1, 30), dtype=np.int32)
    slots = np.array([5, 2, 1, 4, 3])
    for lengths in (np.array([12, 11, 10, 19, 28]), np.array([14, 11, 10, 19, 28])):  # the first still has a mask
        host, device = table.batch(slots, lengths, tokens), table.device_batch(slots, lengths)
        for name in ("temperature", "top_p", "top_k", "min_p", "logprobs"):
            np.testing.assert_array_equal(getattr(device, name), getattr(host, name))
        assert uniforms(device.seed, device.position).tolist() == host.uniform.tolist()
        for name in ("bias_rows", "bias_tokens", "bias_values", "masked_rows", "masked_tokens"):
            np.testing.assert_array_equal(getattr(device, name), getattr(host.adjustments, name))
        assert device.masked_rows.size == (2 if lengths[0] == 12 else 0)
        mine, other = device.penalties, host.adjustments.penalties
        for name in ("rows", "lengths", "prompt_lens", "repetition", "presence", "frequency"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(other, name))
        np.testing.assert_array_equal(tokens[mine.slots, : other.tokens.shape[1]], other.tokens)


def test_greedy_rows_that_ask_for_nothing_need_no_batch():
    table = make_table()
    assert table.device_batch(np.array([1, 1]), np.array([10, 11])) is None
    batch = table.device_batch(np.array([1, 2]), np.array([10, 11]))
    assert len(batch) == 2
    assert batch.penalties is None
    assert not batch.bias_rows.size
