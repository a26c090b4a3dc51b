"""A quantised model through the kernels for GPUs, under Triton's interpreter, is what plain torch makes of it."""

import pytest
from paged_batch import DecoderDriver, random_sequences
from quantised_checkpoints import compressed, fp8, gptq, quantise
from tiny_models import VOCAB_SIZE

INT4 = compressed("pack-quantized", num_bits=4, group_size=32, strategy="group")
SEQUENCE = random_sequences([20], VOCAB_SIZE)[0]


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", INT4),
        ("llama", gptq(4, 32, symmetric=False, act_order=True)),
        ("llama", compressed("int-quantized", activations=True, num_bits=8, strategy="channel")),
        ("llama", fp8((32, 32))),
        ("mixtral", INT4),
    ],
    ids=["int4", "int4 in another order", "int8", "fp8 blocks", "int4 experts"],
)
def test_logits_are_those_of_plain_torch(family, form, tmp_path):
    folder, _ = quantise(family, tmp_path, form, num_hidden_layers=1)
    results = []
    for way in ("triton", "torch"):
        driver = DecoderDriver(folder, [SEQUENCE], way=way)
        for count in (17, 1, 2):
            driver.step({0: count})
        results.append(driver.all_logits(0))
    got, expected = results
    # Activations that are rounded to 8 bits may fall to the other side of a border: 1/127 of the largest.
    tolerance = 1e-5 if form is INT4 else 1e-2
    assert (got - expected).norm() <= tolerance * expected.norm()
