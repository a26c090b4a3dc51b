import math

import pytest
import torch

from raytroupe.kernels.gpu.argmax import argmax, split_argmax
from raytroupe.kernels.sampling import argmax as reference


@pytest.mark.launches("split_argmax_kernel", "merge_argmax_kernel")
@pytest.mark.parametrize("vocab_size", [1, 2, 257, 5003, 9000])
def test_largest_logit_of_parts_of_rows(vocab_size, generator):
    padded = torch.full((6, vocab_size + 5), 1e9)
    logits = padded[:, :vocab_size]
    logits.copy_(torch.randn(6, vocab_size, generator=generator))
    logits[1].round_()  # ties
    logits[2] = -torch.inf
    logits[3, vocab_size // 2 :] = torch.inf
    logits[4] = 0.0
    logits[4, : vocab_size // 3] = -0.0
    assert torch.equal(argmax(logits), reference(logits))


@pytest.mark.launches("split_argmax_kernel", "merge_argmax_kernel")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_nan_comes_before_all(sign):
    logits = torch.zeros(3, 4500)
    logits[0, [17, 4200]] = logits[1, [4300, 4400]] = math.copysign(math.nan, sign)
    logits[:, 5] = torch.inf
    assert argmax(logits).tolist() == [17, 4300, 5]


@pytest.mark.launches("split_argmax_kernel")
def test_rows_to_be_drawn_count_as_finite():
    logits = torch.tensor([[torch.nan, 1.0, torch.inf], [torch.nan, 1.0, torch.inf], [torch.nan] * 3])
    ids = 2**31 - 1 - (split_argmax(logits, torch.tensor([0.0, 0.5, 0.5])) & 0xFFFFFFFF).squeeze(1)
    assert ids.tolist() == [0, 2, 0]
