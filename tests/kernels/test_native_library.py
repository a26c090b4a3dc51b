"""What Python and C++ share is the same on both sides, and doing without a compiler is no error."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raytroupe.kernels import native_library
from raytroupe.kernels.native_library import ACTIVATIONS, INSTRUCTION_SETS, Epilogue, Kind

ROOT = Path(native_library.__file__).resolve().parents[1]
HEADER = re.sub(r"//.*", "", (ROOT / "kernels" / "native" / "operations.h").read_text())
STRUCTS = {
    name.removesuffix("Operation"): value
    for name, value in vars(native_library).items()
    if isinstance(value, type) and issubclass(value, ctypes.Structure)
}
"""By their names in the header."""
TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def fields_in_header(name):
    """(field, type) in order, those of its bases first."""
    base, body = re.search(rf"struct {name}(?: : (\w+))? \{{(.*?)\}};", HEADER, re.DOTALL).groups()
    fields = fields_in_header(base) if base else []
    for declaration in body.split(";"):
        found = re.fullmatch(r"\s*(?:const )?(\w+) (.+?)\s*", declaration, re.DOTALL)
        if found is None:
            assert not declaration.strip(), declaration
            continue
        for field in found[2].split(","):
            pointer = field.strip().startswith("*")
            fields.append((field.strip(" *\n"), ctypes.c_void_p if pointer else TYPES[found[1]]))
    return fields


def fields_in_python(struct):
    """What ctypes lays out: those of its bases first."""
    inherited = [] if struct.__base__ is ctypes.Structure else fields_in_python(struct.__base__)
    return inherited + struct._fields_


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_have_the_fields_of_the_header_in_its_order(name):
    assert fields_in_header(name) == fields_in_python(STRUCTS[name])


def test_every_operation_of_the_header_is_known():
    assert set(re.findall(r"struct (\w+) : \w+ \{", HEADER)) == STRUCTS.keys() - {"Step"}


def enumerators(name):
    return re.findall(r"\w+", re.search(rf"enum {name} : int32_t \{{(.*?)\}}", HEADER, re.DOTALL)[1])


def test_enumerators_have_the_numbers_of_the_header():
    assert [*Kind.__members__, "NUM_KINDS"] == enumerators("Kind")
    assert list(Epilogue.__members__) == enumerators("Epilogue")
    assert [name.upper() for name in ACTIVATIONS] == enumerators("Activation")
    for numbers in (Kind, Epilogue, ACTIVATIONS.values()):
        assert list(numbers) == list(range(len(numbers)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler to build it with")
def test_it_was_built_at_installation():
    assert native_library.is_built()
    assert native_library.supports(torch.device("cpu"), torch.float32)
    assert native_library.supports(torch.device("cpu"), torch.bfloat16)
    assert native_library.instruction_set() in INSTRUCTION_SETS


def test_other_devices_and_dtypes_take_the_torch_path():
    assert not native_library.supports(torch.device("cpu"), torch.float16)
    assert not native_library.supports(torch.device("meta"), torch.float32)


def test_an_instruction_set_that_is_not_there_is_refused(instruction_set):
    with pytest.raises(ValueError, match="no instruction set 'avx1024'; known are baseline, avx2"):
        native_library.use_instruction_set("avx1024")
    assert native_library.instruction_set() == instruction_set


def test_installation_without_a_compiler_succeeds(tmp_path):
    missing = str(tmp_path / "no-compiler")
    command = [sys.executable, "-c", "from setuptools import setup; setup()", "build_ext"]
    result = subprocess.run(
        [*command, "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "objects", "--force"],
        cwd=ROOT,
        env={**os.environ, "CC": missing, "CXX": missing},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "no-compiler" in result.stdout + result.stderr, "another compiler was found"
    assert not list((tmp_path / "lib").rglob("_native*"))
