"""The C kernel is there where it can be built, and refuses what it does not know."""

import shutil

import pytest
import torch

from raytroupe.kernels.native_attention import can_decode


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no compiler to build it with")
def test_it_was_built_at_installation():
    assert can_decode(torch.device("cpu"), torch.float32)
    assert can_decode(torch.device("cpu"), torch.bfloat16)


def test_other_devices_and_dtypes_take_the_torch_path():
    assert not can_decode(torch.device("cpu"), torch.float16)
    assert not can_decode(torch.device("meta"), torch.float32)
