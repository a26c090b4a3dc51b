"""How the weights of a checkpoint are quantised, module by module.

`cluster/quantisation_config.py` reads it from the checkpoint's config; `actors/quantised_layouts.py` knows what the
layouts mean byte by byte.
"""

from __future__ import annotations

import enum
import functools
import re

import msgspec


class Layout(enum.Enum):
    """How a quantised matrix [out, in] is stored."""

    GPTQ = "gptq"
    """Integers packed along `in`, transposed; every stored zero point is one too small."""
    GPTQ_V2 = "gptq_v2"
    """The same with zero points as they are."""
    AWQ = "awq"
    """4 bits packed along `out`, transposed, eight of them interleaved in a word."""
    PACKED = "pack-quantized"
    """compressed-tensors: integers packed along `in`."""
    PLAIN = "plain"
    """One element per integer or float."""


class Scheme(msgspec.Struct, frozen=True, kw_only=True):
    """How one matrix [out, in] is quantised."""

    layout: Layout
    bits: int
    """2 to 8."""
    is_float: bool = False
    """float8_e4m3fn."""
    group_size: int | None = None
    """Inputs that share a scale; None: all."""
    rows_per_scale: int | None = 1
    """Outputs that share a scale; None: all."""
    symmetric: bool = True
    """There are no zero points beside the middle of the range."""
    act_order: bool = False
    """Which group an input belongs to is stored with the weight."""
    activations: str | None = None
    """What activations are rounded to, "int8" or "fp8"; None: they stay as they are."""

    @property
    def label(self) -> str:
        """In a few words, such as "int4 g128"."""
        words = f"{'fp' if self.is_float else 'int'}{self.bits}"
        if self.rows_per_scale is not None and self.rows_per_scale > 1:
            words += f" {self.rows_per_scale}x{self.group_size}"
        elif self.group_size is not None:
            words += f" g{self.group_size}"
        return words if self.activations is None else f"{words} with {self.activations} activations"

    @property
    def bits_held(self) -> int:
        """Per weight in memory, as `kernels/quantised_weight.py` keeps it."""
        return 4 if self.bits <= 4 else 8

    def nbytes(self, out: int, inputs: int) -> int:
        """Bytes of a matrix [out, inputs] in memory: values, one scale per row and group, zero points."""
        groups = 1 if self.group_size is None else -(-inputs // self.group_size)
        scale = 4 if self.is_float else 2
        return out * (inputs * self.bits_held // 8 + groups * (scale + (not self.symmetric)))


class Rule(msgspec.Struct, frozen=True):
    """The scheme of the modules that `target` names."""

    target: str
    """A module's name, or "re:" and an expression that matches its beginning (`re.match`)."""
    scheme: Scheme | None
    """None: they are not quantised."""


class Quantisation(msgspec.Struct, frozen=True, cache_hash=True):
    """Which modules of a checkpoint are quantised, and how."""

    method: str
    """As the config names it."""
    rules: tuple[Rule, ...]
    """The first that matches a module counts; what none matches is not quantised."""

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All that occur, the first first."""
        return tuple(dict.fromkeys(rule.scheme for rule in self.rules if rule.scheme is not None))

    @property
    def label(self) -> str:
        """In a few words, such as "int4 g128"."""
        return " and ".join(dict.fromkeys(scheme.label for scheme in self.schemes))

    def scheme(self, module: str) -> Scheme | None:
        """That of a linear layer, by its name in the checkpoint; None: it is not quantised."""
        return _scheme(self, module)


@functools.lru_cache(maxsize=1 << 16)
def _scheme(quantisation: Quantisation, module: str) -> Scheme | None:
    rules = quantisation.rules
    exact, patterns = _compiled(quantisation)
    first = exact.get(module, len(rules))
    for index, pattern in patterns:
        if index > first:
            break
        if pattern.match(module):
            first = index
            break
    return rules[first].scheme if first < len(rules) else None


@functools.lru_cache(maxsize=16)
def _compiled(quantisation: Quantisation) -> tuple[dict[str, int], list[tuple[int, re.Pattern[str]]]]:
    """The index of the first rule for each name, and the expressions with theirs."""
    exact: dict[str, int] = {}
    patterns = []
    for index, rule in enumerate(quantisation.rules):
        if rule.target.startswith("re:"):
            patterns.append((index, re.compile(rule.target.removeprefix("re:"))))
        else:
            exact.setdefault(rule.target, index)
    return exact, patterns
