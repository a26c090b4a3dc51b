"""Every family gives transformers' logits: prompts whole and in chunks, decode steps, mixed batches."""

import json

import pytest
import torch
import transformers
from paged_batch import WAYS, DecoderDriver, random_sequences
from tiny_models import FAMILIES, VOCAB_SIZE, load_reference, make_tiny_model

LENGTHS = [9, 37, 74]
DECODE_STEPS = 4

pytestmark = pytest.mark.usefixtures("single_thread")


def reference_logits(folder, sequences):
    model = load_reference(folder)
    with torch.inference_mode():
        return [model(torch.tensor([sequence])).logits[0] for sequence in sequences]


def assert_same_logits(driver, expected):
    for index, logits in enumerate(expected):
        assert driver.all_logits(index).dtype == torch.float32
        torch.testing.assert_close(driver.all_logits(index), logits, rtol=0, atol=1e-4)


def decode_to_the_end(driver):
    for _ in range(DECODE_STEPS):
        driver.step(dict.fromkeys(range(len(driver.sequences)), 1))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A tiny model, sequences and transformers' logits."""
    folder = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    sequences = random_sequences([length + DECODE_STEPS for length in LENGTHS], VOCAB_SIZE)
    return folder, sequences, reference_logits(folder, sequences)


@pytest.mark.parametrize("way", WAYS)
def test_logits_equal_transformers(family, way):
    folder, sequences, expected = family
    whole = DecoderDriver(folder, sequences, way=way)
    whole.step(dict(enumerate(LENGTHS)))
    decode_to_the_end(whole)
    assert_same_logits(whole, expected)

    # Chunks that end inside blocks; the short prompt decodes beside the others' chunks.
    chunked = DecoderDriver(folder, sequences, way=way)
    chunked.step({0: 9, 1: 13, 2: 1})
    chunked.step({0: 1, 1: 24, 2: 29})
    chunked.step({0: 1, 2: 44, 1: 1})
    chunked.step({0: 2, 1: 3, 2: 4})
    assert_same_logits(chunked, expected)


def test_the_kernels_of_a_gpu_give_the_same_logits(family):
    """Chunks and decode rows together; Triton's interpreter is slow, so no more than that."""
    folder, sequences, expected = family
    driver = DecoderDriver(folder, sequences, way="triton")
    driver.step({0: 9, 1: 5, 2: 1})
    driver.step({0: 1, 1: 24, 2: 20})
    for index, logits in enumerate(expected):
        computed = driver.all_logits(index)
        torch.testing.assert_close(computed, logits[: len(computed)], rtol=0, atol=1e-4)


def test_a_recorded_step_is_bit_for_bit_the_one_of_the_same_kernels_called_one_by_one(family):
    folder, sequences, _ = family
    drivers = [DecoderDriver(folder, sequences, way=way) for way in ("native", "recorded")]
    for driver in drivers:
        driver.step({0: 9, 1: 13, 2: 1})
        driver.step({0: 1, 1: 24, 2: 29})
        driver.step({0: 1, 1: 1})
    for sequence in range(3):
        assert torch.equal(drivers[0].all_logits(sequence), drivers[1].all_logits(sequence))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
        ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "num_experts_per_tok": 5}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16, "attention_bias": True}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
        ("gemma2", {"attention_bias": True, "tie_word_embeddings": False}),
        ("gemma3", {"attn_logit_softcapping": None, "final_logit_softcapping": 7.0}),
        ("phi3", {"sliding_window": 20, "rope_parameters": None}),
        ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
        ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu"}),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8}),
    ],
)
def test_options_of_a_family(family, overrides, tmp_path):
    folder = make_tiny_model(family, tmp_path, **overrides)
    sequences = random_sequences([length + DECODE_STEPS for length in LENGTHS], VOCAB_SIZE)
    expected = reference_logits(folder, sequences)
    for way in ("torch", "recorded"):
        driver = DecoderDriver(folder, sequences, way=way)
        driver.step(dict(enumerate(LENGTHS)))
        decode_to_the_end(driver)
        assert_same_logits(driver, expected)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_scalings(rope, tmp_path):
    folder = make_tiny_model("llama", tmp_path, rope_parameters={"rope_theta": 10000.0, **rope})
    sequences = random_sequences([length + DECODE_STEPS for length in LENGTHS], VOCAB_SIZE)
    driver = DecoderDriver(folder, sequences)
    driver.step(dict(enumerate(LENGTHS)))
    decode_to_the_end(driver)
    assert_same_logits(driver, reference_logits(folder, sequences))


def test_longrope_uses_long_factors_when_the_served_context_is_longer_than_the_original(tmp_path):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.8,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.5, 3.0, 3.5],
    }
    folder = make_tiny_model("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=64)
    long = random_sequences([100], VOCAB_SIZE)
    driver = DecoderDriver(folder, long, max_model_len=512)
    driver.step({0: 60})
    driver.step({0: 40})
    assert_same_logits(driver, reference_logits(folder, long))

    short = random_sequences([50], VOCAB_SIZE)
    driver = DecoderDriver(folder, short, max_model_len=64)
    driver.step({0: 50})
    assert_same_logits(driver, reference_logits(folder, short))


def test_the_text_part_of_a_multimodal_gemma3(tmp_path):
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "initializer_range": 0.25,
        "max_position_embeddings": 512,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=122,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    sequences = random_sequences([60], 120)
    driver = DecoderDriver(tmp_path, sequences)
    driver.step({0: 60})
    with torch.inference_mode():
        expected = model(torch.tensor(sequences)).logits
    assert_same_logits(driver, [expected[0]])


@pytest.mark.parametrize("family", ["llama3", "gemma3", "phi3"])
def test_configs_written_by_transformers_4_mean_the_same(family, tmp_path):
    """`rope_theta`, `rope_scaling`, `torch_dtype` at the top level; Gemma 3 with a local base and no layer types."""
    folder = make_tiny_model(family, tmp_path)
    path = folder / "config.json"
    new = json.loads(path.read_text())
    sequences = random_sequences([40], VOCAB_SIZE)
    before = DecoderDriver(folder, sequences)
    before.step({0: 40})

    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    old["torch_dtype"] = new["dtype"]
    rope = dict(new["rope_parameters"])
    if family == "gemma3":
        old["rope_theta"] = rope["full_attention"]["rope_theta"]
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = 3
        del old["layer_types"]
    else:
        old["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        old["rope_scaling"] = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    path.write_text(json.dumps(old))
    after = DecoderDriver(folder, sequences)
    after.step({0: 40})
    assert after.stage.spec == before.stage.spec
    assert torch.equal(after.all_logits(0), before.all_logits(0))


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "granite"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(family, tmp_path):
    folder = make_tiny_model(family, tmp_path)
    sequences = random_sequences([60], VOCAB_SIZE)
    exact = reference_logits(folder, sequences)[0]
    with torch.inference_mode():
        theirs = load_reference(folder).bfloat16()(torch.tensor(sequences)).logits[0].float()
    for way in WAYS:
        driver = DecoderDriver(folder, sequences, dtype=torch.bfloat16, way=way)
        driver.step({0: 50})
        for _ in range(10):
            driver.step({0: 1})
        ours = driver.all_logits(0)
        assert (ours - exact).square().mean() < 1.5 * (theirs - exact).square().mean(), way
