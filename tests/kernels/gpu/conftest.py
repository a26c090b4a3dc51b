"""Triton's kernels on the CPU, and a check that a test which claims to try a kernel launches it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

_ROUNDED_BY_TORCH = {
    tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
}


@pytest.fixture(autouse=True)
def _nearest(monkeypatch):
    """The interpreter rounds float32 to smaller formats by its own means, and wrongly where a fraction carries over."""
    convert = interpreter._convert_float

    def nearest(data, source, target, rounding):
        if source == tl.float32 and target in _ROUNDED_BY_TORCH:
            dtype, bits, result = _ROUNDED_BY_TORCH[target]
            values = torch.from_numpy(np.ascontiguousarray(data))
            return values.to(dtype).view(bits).numpy().view(result)
        return convert(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


@pytest.fixture(autouse=True)
def _launches(request, monkeypatch):
    """A test with `@pytest.mark.launches("name_kernel", ...)` fails unless all of these kernels ran."""
    launched = set()
    run = InterpretedFunction.run

    def note(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", note)
    yield
    claimed = {name for mark in request.node.iter_markers("launches") for name in mark.args}
    assert claimed <= launched, f"never launched: {sorted(claimed - launched)}"
