import pytest
import torch

from raytroupe.kernels.gpu.norm import add_rms_norm, rms_norm
from raytroupe.kernels.norm import rms_norm as reference


@pytest.mark.launches("rms_norm_kernel")
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 96), (3, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_the_reference(rows, width, dtype, generator):
    x = torch.randn(rows, width, generator=generator).to(dtype) * 3
    weight = torch.randn(width, generator=generator)
    expected = reference(x, weight, 1e-5)
    out = rms_norm(x, weight, 1e-5, out=torch.full_like(x, torch.nan))
    torch.testing.assert_close(out, expected)


@pytest.mark.launches("rms_norm_kernel")
def test_norm_of_chosen_rows_and_of_parts_of_rows_in_place(generator):
    x = torch.randn(7, 48, generator=generator)
    weight = torch.randn(40, generator=generator)
    rows = torch.tensor([6, 0, 0])
    part, rest = x[:, 4:44], x[:, 44:].clone()
    torch.testing.assert_close(
        rms_norm(part, weight, 1e-6, out=torch.empty(3, 40), rows=rows), reference(part[rows], weight, 1e-6)
    )
    expected = reference(part, weight, 1e-6)
    rms_norm(part, weight, 1e-6, out=part)
    torch.testing.assert_close(part, expected)
    assert torch.equal(x[:, 44:], rest)


@pytest.mark.launches("add_rms_norm_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 0.22])
def test_residual_is_added_and_rounded_before_the_norm(dtype, alpha, generator):
    hidden, x = (torch.randn(4, 72, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(72, generator=generator)
    expected = hidden.clone().add_(x, alpha=alpha)
    out = add_rms_norm(hidden, x, alpha, weight, 1e-5)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.03)
    torch.testing.assert_close(out, reference(hidden, weight, 1e-5))
