"""What a quantisation did, as figures and as tables."""

from __future__ import annotations

import dataclasses

from rich.console import Group, RenderableType
from rich.table import Table

from .hidden_states import BLOCK_SIZE
from .options import CHANNEL, QuantiseOptions


@dataclasses.dataclass(frozen=True, slots=True)
class WeightFigures:
    """One quantised weight."""

    kind: str
    error: float
    """Root of the squared error by the root of the squares: of the outputs over the calibration's inputs, or of the
    weights where none were seen."""
    few_inputs: bool = False
    """Rounded to nearest, because calibration had too few inputs for it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of something before and after."""

    before: int
    after: int

    def __str__(self) -> str:
        return f"{_megabytes(self.before)} → {_megabytes(self.after)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """A finished quantisation."""

    options: QuantiseOptions
    weights: list[WeightFigures]
    seconds: float
    peak_memory: int
    """Bytes of this process at most."""
    layers: Sizes
    """The quantised weights of the layers: in the source's dtype, and all that stands for them."""
    model: Sizes
    """All tensors."""
    calibrated_tokens: int
    """0: nothing was calibrated."""
    kv_blocks: int
    """Of `BLOCK_SIZE` tokens in the model's dtype: so many fit what the smaller weights leave of the memory that they
    are served from. There 3 bits take 4."""

    @property
    def ratio(self) -> float:
        """Size of the layers' quantised weights by their size before."""
        return self.layers.after / self.layers.before

    def tables(self) -> RenderableType:
        """For a terminal."""
        return Group(self._sizes(), self._errors(), *self._remarks())

    def _sizes(self) -> Table:
        options = self.options
        table = Table(title="quantised", title_justify="left", show_header=False)
        group_size = "all inputs" if options.group_size == CHANNEL else f"groups of {options.group_size}"
        table.add_row("method", f"{options.method}, {options.bits} bits, {group_size}")
        table.add_row("calibration", f"{self.calibrated_tokens:,} tokens" if self.calibrated_tokens else "none")
        table.add_row("layers' weights", f"{self.layers}, ratio {self.ratio:.3f}")
        table.add_row("whole model", str(self.model))
        table.add_row("room for KV", f"{self.kv_blocks:,} more blocks, {self.kv_blocks * BLOCK_SIZE:,} tokens")
        table.add_row("time", f"{self.seconds:.1f} s")
        table.add_row("peak memory", _megabytes(self.peak_memory))
        return table

    def _errors(self) -> Table:
        of_what = "outputs" if self.calibrated_tokens else "weights"
        table = Table(title=f"relative error of the {of_what}", title_justify="left")
        for name in ("weights", "number", "mean", "largest"):
            table.add_column(name, justify="left" if name == "weights" else "right")
        for kind in dict.fromkeys(weight.kind for weight in self.weights):
            errors = [weight.error for weight in self.weights if weight.kind == kind]
            mean = sum(errors) / len(errors)
            table.add_row(kind, str(len(errors)), f"{mean:.4f}", f"{max(errors):.4f}")
        return table

    def _remarks(self) -> list[str]:
        few = sum(weight.few_inputs for weight in self.weights)
        if not few:
            return []
        return [f"{few} weights met too few calibration tokens and were rounded to nearest; more --samples reach more."]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
