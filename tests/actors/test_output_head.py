"""Logits and the most likely tokens of chosen rows are the same from a program and from kernels called one by one."""

import pytest
import torch
from paged_batch import MAX_SAMPLES, DecoderDriver, random_sequences
from tiny_models import VOCAB_SIZE, make_tiny_model

from raytroupe.actors.output_head import OutputHead

LENGTHS = [9, 21, 5]
ROWS = [[8], [33, 0, 8], [5, 5, 30, 1]]

pytestmark = pytest.mark.usefixtures("single_thread")


def hidden_of(driver):
    """The hidden states of a step of all sequences: [35, hidden]."""
    blocks, sequences = driver.blocks, driver.sequences
    metadata = blocks.metadata([(i, 0, len(sequence)) for i, sequence in enumerate(sequences)])
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    return driver.stage.decoder.forward(tokens, None, metadata, driver.stage.cache)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def decoders(request, tmp_path_factory):
    """Of kernels one by one and recorded, with hidden states of each; gemma2 bounds its logits and has tied weights."""
    folder = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    drivers = [DecoderDriver(folder, random_sequences(LENGTHS, VOCAB_SIZE), way=way) for way in ("native", "recorded")]
    return [(driver.stage.decoder, hidden_of(driver)) for driver in drivers]


@pytest.mark.parametrize("rows", ROWS)
def test_a_program_gives_every_bit_of_its_kernels(decoders, rows, monkeypatch):
    (plain, hidden), (recorded, same_hidden) = decoders
    assert len(rows) <= MAX_SAMPLES
    rows = torch.tensor(rows)
    logits, tokens = plain.logits(hidden, rows).clone(), plain.likeliest(hidden, rows)
    assert torch.equal(logits, plain.logits(hidden)[rows])
    assert tokens == logits.argmax(-1).tolist()
    monkeypatch.setattr(OutputHead, "_project", None)
    assert torch.equal(recorded.logits(same_hidden, rows), logits)
    assert recorded.likeliest(same_hidden, rows) == tokens


def test_what_a_program_has_no_room_for_runs_without_it(decoders):
    (plain, hidden), (recorded, same_hidden) = decoders
    rows = torch.arange(MAX_SAMPLES + 1)
    logits = plain.logits(hidden, rows).clone()
    assert torch.equal(recorded.logits(same_hidden, rows), logits)
    assert recorded.likeliest(same_hidden, rows) == logits.argmax(-1).tolist()
    elsewhere = same_hidden.clone()
    assert torch.equal(recorded.logits(elsewhere, rows[:2]), logits[:2])
    assert torch.equal(recorded.logits(same_hidden), plain.logits(hidden))
