import pytest
import torch

from raytroupe.kernels.activation import gated_activation as reference
from raytroupe.kernels.gpu.activation import ACTIVATIONS, gated_activation


@pytest.mark.launches("gated_activation_kernel")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 1100])
def test_activation_is_the_reference(activation, dtype, width, generator):
    x = (torch.randn(3, 2 * width, generator=generator) * 4).to(dtype)
    torch.testing.assert_close(gated_activation(x, activation), reference(x, activation))


@pytest.mark.launches("gated_activation_kernel")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates(activation):
    x = torch.tensor([[-1e4, 1e4, 0.0, -60.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(gated_activation(x, activation), reference(x, activation))
