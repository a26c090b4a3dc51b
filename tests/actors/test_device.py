"""What "auto" resolves to."""

import pytest
import torch

from raytroupe.actors import device as device_module
from raytroupe.actors.device import cpu_has_bfloat16, resolve_device, resolve_dtype, resolve_kv_dtype
from raytroupe.cluster.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx2 avx512f avx512_bf16 sha", True), ("amx_bf16 amx_int8", True), ("avx2 avx512f avx512_vnni", False)],
)
def test_bfloat16_hardware_is_read_from_cpuinfo(flags, expected, tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: x\nflags\t\t: fpu {flags}\nbugs\t\t: avx512_bf16\n")
    assert cpu_has_bfloat16(path) is expected
    assert cpu_has_bfloat16(tmp_path / "missing") is False


@pytest.mark.parametrize(
    ("asked", "checkpoint", "hardware", "expected"),
    [
        ("auto", "float32", True, torch.float32),
        ("auto", "bfloat16", True, torch.bfloat16),
        ("auto", "bfloat16", False, torch.float32),
        ("auto", "float16", True, torch.bfloat16),
        ("auto", "float16", False, torch.float32),
        ("bfloat16", "float32", False, torch.bfloat16),
        ("float32", "bfloat16", True, torch.float32),
    ],
)
def test_dtype_on_a_cpu(asked, checkpoint, hardware, expected, monkeypatch):
    monkeypatch.setattr(device_module, "cpu_has_bfloat16", lambda: hardware)
    assert resolve_dtype(asked, checkpoint, CPU) is expected


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(ConfigError, match="device = 'cuda'"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cpu") == CPU


def test_dtype_of_the_cache(monkeypatch):
    assert resolve_kv_dtype("auto", torch.bfloat16, CPU) is torch.bfloat16
    assert resolve_kv_dtype("int8", torch.bfloat16, CPU) is torch.int8
    assert resolve_kv_dtype("fp8", torch.float32, CPU) is torch.float8_e4m3fn
    gpu = torch.device("cuda", 0)
    for capability, has_fp8 in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert resolve_kv_dtype("int8", torch.bfloat16, gpu) is torch.int8
        if has_fp8:
            assert resolve_kv_dtype("fp8", torch.bfloat16, gpu) is torch.float8_e4m3fn
        else:
            with pytest.raises(ConfigError, match=rf"capability 8\.{capability[1]} and fp8 needs 8\.9; use 'int8'"):
                resolve_kv_dtype("fp8", torch.bfloat16, gpu)
