"""What calibration learns about the inputs of a weight, and the kernels that learn it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.interface import Linear
from ...kernels.linear import PlainLinear
from ...kernels.quantised_weight import Weight
from ...kernels.torch_kernels import TorchKernels

MIN_ROWS = 128
"""With fewer inputs, what they tell of a weight is chance."""


class InputStatistics:
    """Sums over all rows x that a weight was multiplied with."""

    def __init__(self, inputs: int) -> None:
        self.rows = 0
        self.products = torch.zeros(inputs, inputs)
        """The sum of x xᵀ, [in, in] float32: half the Hessian of the squared error of the weight's outputs."""
        self.magnitudes = torch.zeros(inputs)
        """The sum of |x|, [in] float32."""

    @property
    def suffices(self) -> bool:
        """Whether a weight may be fitted to these inputs."""
        return self.rows >= MIN_ROWS

    def note(self, x: Tensor) -> None:
        """Add the rows of x [T, in] float32."""
        self.rows += len(x)
        self.products.addmm_(x.T, x)
        self.magnitudes += x.abs().sum(0)

    def divide_inputs(self, scales: Tensor) -> None:
        """As if every x had been x / scales [in]."""
        self.products.div_(scales[:, None]).div_(scales)
        self.magnitudes /= scales

    def relative_error(self, weight: Tensor, replacement: Tensor) -> float:
        """How far the replacement's outputs are from the weight's: root of the squared error over all rows and outputs,
        by the root of the squared outputs."""
        return (self.squared_output(weight - replacement) / self.squared_output(weight)) ** 0.5

    def squared_output(self, weight: Tensor) -> float:
        """The sum over all rows of |W x|², for a weight [out, in] float32."""
        of_rows = (weight @ self.products).mul_(weight).sum(1)
        return max(of_rows.sum(dtype=torch.float64).item(), 1e-30)


class ObservedLinear(PlainLinear):
    """A product that notes its inputs while it is told to. The weight is not copied: changes to it count at once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: CalibrationKernels) -> None:
        super().__init__(weight, bias)
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        if self._kernels.observing:
            self._kernels.statistics[self.weight.data_ptr()].note(x)
        return super().__call__(x)


class CalibrationKernels(TorchKernels):
    """Kernels in float32 that observe the products with some weights."""

    def __init__(self, observed: list[Tensor]) -> None:
        super().__init__(torch.device("cpu"), torch.float32)
        self.observing = False
        self.statistics = {weight.data_ptr(): InputStatistics(weight.shape[1]) for weight in observed}
        """By the place of the weight in memory: the experts of a layer are parts of one tensor."""

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        """See `interface.Kernels`."""
        if isinstance(weight, Tensor) and weight.data_ptr() in self.statistics:
            return ObservedLinear(weight, bias, self)
        return super().linear(weight, bias)

    def of(self, weight: Tensor) -> InputStatistics:
        """What was noted for an observed weight."""
        return self.statistics[weight.data_ptr()]
