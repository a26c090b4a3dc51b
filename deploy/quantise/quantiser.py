"""Quantising a model, one layer at a time.

    hidden states before layer i ──▶ layer i, observed ──▶ statistics of every weight's inputs
                                                              │ round the weights
    hidden states before layer i ──▶ layer i, rounded ──▶ hidden states before layer i + 1

In memory are at most one layer in float32, the products of its inputs (a square for each weight), a batch, and for the
weight in work either three more copies of it or, while gptq solves, one copy and two more squares. Hidden states and
finished layers lie on disk (`partial.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ... import __version__
from ...actors.collectives import SingleShard
from ...actors.decoder import Decoder
from ...actors.kv_cache import KVCache
from ...actors.weights import LayerWeights, Weights
from ...cluster.checkpoint_files import weight_files
from ...cluster.errors import CheckpointError, ConfigError
from ...cluster.model_spec import load_spec
from ...cluster.topology import ShardLayout, kv_bytes_per_block, weight_bytes
from .assembly import assemble
from .awq import InputScaling, round_with_searched_scales
from .changed_vectors import changed_vectors, vectors
from .checkpoint_writer import entries_of
from .compressed_tensors import module_tensors
from .gptq import round_with_compensation
from .hidden_states import BLOCK_SIZE, Batches, create_hidden_states, open_hidden_states
from .one_layer import CPU, OneLayer, Target, load_layer, slices_to_quantise, targets, weight_names
from .options import Method, QuantiseOptions
from .partial import PartialResult
from .rounding import Grid, RoundedWeight, round_to_nearest
from .statistics import CalibrationKernels, InputStatistics
from .summary import Summary, WeightFigures

Report = Callable[[str, float], None]
"""Called with what is being done and which part of all is done, 0 to 1."""


class Quantiser:
    """One quantisation of one model."""

    def __init__(
        self,
        source: Path,
        out: Path,
        options: QuantiseOptions,
        sequences: Sequence[list[int]] | None = None,
        *,
        restart: bool = False,
        report: Report = lambda what, done: None,
    ) -> None:
        """
        Args:
            sequences: token ids to calibrate with, at least two in each; None: nothing is calibrated.

        Raises:
            ConfigError: options that do not fit the model, or `out` holds something else.
            CheckpointError: the model cannot be read.
        """
        options.check()
        self._spec = load_spec(source)
        if self._spec.quantisation is not None:
            raise ConfigError(f"{source} is quantised already; give the unquantised model that it was made from")
        if options.method is not Method.RTN and sequences is None:
            raise ConfigError(f"--method {options.method} needs texts to calibrate with; give --calibration FILE")
        self._source, self._options, self._report = source, options, report
        if options.head_bits is not None and self._spec.tie_word_embeddings:
            raise ConfigError("--head-bits needs an output projection of its own; this model's is its embedding")
        self._names = weight_names(source, self._spec)
        options.check_group_size(self._inputs())
        self._sequences = sequences
        self._batches = Batches([len(tokens) for tokens in sequences or ()])
        self._dtype = getattr(torch, self._spec.dtype)
        self._grid = Grid(options.bits, options.group_size, options.symmetric, self._dtype)
        self._partial = PartialResult(out, self._identity(), restart=restart)

    def run(self) -> Summary:
        """Quantise what is left to do and write the checkpoint."""
        count = self._spec.num_layers
        done = self._partial.layers_done()
        if done == 0 and self._sequences is not None:
            self._embed(self._sequences)
        for index in range(done, count):
            self._quantise_layer(index)
        if self._options.head_bits is not None and self._partial.layers_done() == count:
            self._quantise_head()
        self._report("writing", 1.0)
        return self._finish()

    def _inputs(self) -> dict[str, int]:
        """Number of inputs of every weight that is quantised, by its name in the checkpoint."""
        pieces = [
            piece
            for index in range(self._spec.num_layers)
            for _, slices in slices_to_quantise(self._names, self._spec, index)
            for piece in slices
        ]
        if self._options.head_bits is not None:
            pieces += self._names.head()
        return {piece.name: piece.num_columns or 1 for piece in pieces}

    def _identity(self) -> dict[str, Any]:
        """All that decides about the result, for `PartialResult`."""
        files = [(path.name, path.stat()) for path in (self._source / "config.json", *weight_files(self._source))]
        fields = dataclasses.asdict(self._options)
        fields["calibration"] = str(self._options.calibration) if self._options.calibration else None
        return {
            **fields,
            "calibration_tokens": _digest(self._sequences),
            "source": str(self._source),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files},
            "troupe": __version__,
        }

    def _hidden_states(self, index: int, place: Callable[[Path, int, int, torch.dtype], Tensor]) -> Tensor:
        """[tokens, hidden] before layer `index`; a file that `place` creates or opens."""
        dtype = torch.float32 if self._dtype == torch.float16 else self._dtype  # a float32 model may exceed its range
        return place(self._partial.hidden_states(index), self._batches.tokens, self._spec.hidden_size, dtype)

    def _embed(self, sequences: Sequence[list[int]]) -> None:
        (piece,) = self._names.embedding()
        (entry,) = [entry for entry in entries_of(weight_files(self._source)) if entry.name == piece.name]
        scale = torch.tensor(self._spec.embedding_scale, dtype=self._dtype)
        hidden = self._hidden_states(0, create_hidden_states)
        with safe_open(entry.file, framework="pt") as file:
            table = file.get_tensor(entry.name)
            start = 0
            for tokens in sequences:
                hidden[start : start + len(tokens)] = table[torch.tensor(tokens)].to(self._dtype) * scale
                start += len(tokens)

    def _quantise_layer(self, index: int) -> None:
        begin = time.perf_counter()
        layer = load_layer(self._source, self._spec, index)
        found = targets(layer, self._names, self._spec, index)
        kernels = CalibrationKernels([target.weight for target in found])
        before = vectors(layer)
        decoder = None
        if self._sequences is not None:
            decoder = self._decoder(index, layer, kernels)
            kernels.observing = True
            self._pass(index, decoder, None)
            kernels.observing = False
        if self._options.method is Method.AWQ:
            self._tell(index, 0.45)
            InputScaling(self._spec, self._grid, self._dtype, kernels.of).scale_layer(layer)
        tensors: dict[str, Tensor] = {}
        figures = []
        for number, target in enumerate(found):
            self._tell(index, 0.45 + 0.1 * number / len(found))
            rounded, figure = self._round(target, kernels.statistics.pop(target.weight.data_ptr()))
            figures.append(figure)
            target.weight.copy_(rounded.dequantise())
            tensors |= self._tensors(target, rounded)
        tensors |= changed_vectors(layer, before, self._names, self._spec, index)
        if decoder is not None and index + 1 < self._spec.num_layers:
            self._pass(index, decoder, self._hidden_states(index + 1, create_hidden_states))
        record = {"seconds": time.perf_counter() - begin, "weights": [dataclasses.asdict(figure) for figure in figures]}
        self._partial.save_layer(index, tensors, record)

    def _decoder(self, index: int, layer: LayerWeights, kernels: CalibrationKernels) -> Decoder:
        longest = max(map(len, self._sequences or ()))
        return Decoder(
            self._spec,
            OneLayer(layer=index),
            Weights(layers=[layer]),
            kernels,
            SingleShard(),
            max_model_len=longest,
            dtype=torch.float32,
            device=CPU,
        )

    def _pass(self, index: int, decoder: Decoder, into: Tensor | None) -> None:
        """All sequences through the layer, and what comes out `into` [tokens, hidden]."""
        source = self._hidden_states(index, open_hidden_states)
        layout = OneLayer(layer=index)
        cache = KVCache(self._spec, layout, self._batches.num_blocks, BLOCK_SIZE, torch.float32, CPU)
        for number, (rows, metadata) in enumerate(self._batches):
            hidden = decoder.forward(None, source[rows].to(torch.float32, copy=True), metadata, cache)
            if into is not None:
                into[rows] = hidden.to(into.dtype)
            self._tell(index, (0.45 * number / len(self._batches)) + (0.55 if into is not None else 0))

    def _tell(self, index: int, part: float) -> None:
        count = self._spec.num_layers
        self._report(f"layer {index + 1} of {count}", (index + part) / count)

    def _round(self, target: Target, statistics: InputStatistics) -> tuple[RoundedWeight, WeightFigures]:
        weight, grid, method = target.weight, self._grid, self._options.method
        if statistics.rows and not math.isfinite(statistics.products.sum()):
            raise CheckpointError(f"{self._source}: inputs of {target.slices[0].name} are not finite; is it damaged?")
        few = method is not Method.RTN and not statistics.suffices
        if method is Method.RTN or few:
            rounded = round_to_nearest(weight, grid)
        elif method is Method.GPTQ:
            rounded = round_with_compensation(weight, statistics.products, grid)
        else:
            rounded = round_with_searched_scales(weight, statistics.products, grid)
        if statistics.rows:
            error = statistics.relative_error(weight, rounded.dequantise())
        else:
            error = _relative_difference(weight, rounded.dequantise())
        return rounded, WeightFigures(target.kind, error, few)

    def _tensors(self, target: Target, rounded: RoundedWeight) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for module, (start, stop) in target.modules().items():
            packed = self._options.activation_bits is None
            tensors |= module_tensors(module, rounded.rows(start, stop), packed=packed)
        return tensors

    def _quantise_head(self) -> None:
        """Round the output projection to nearest, as a layer behind the others."""
        assert self._options.head_bits is not None
        begin = time.perf_counter()
        (piece,) = self._names.head()
        (entry,) = [entry for entry in entries_of(weight_files(self._source)) if entry.name == piece.name]
        with safe_open(entry.file, framework="pt") as file:
            weight = file.get_tensor(entry.name).float()
        grid = dataclasses.replace(self._grid, bits=self._options.head_bits)
        rounded = round_to_nearest(weight, grid)
        figure = WeightFigures("head", _relative_difference(weight, rounded.dequantise()))
        tensors = self._tensors(Target("head", weight, [piece]), rounded)
        record = {"seconds": time.perf_counter() - begin, "weights": [dataclasses.asdict(figure)]}
        self._partial.save_layer(self._spec.num_layers, tensors, record)

    def _finish(self) -> Summary:
        """Write everything to its place."""
        begin = time.perf_counter()
        records = [self._partial.figures(index) for index in range(self._partial.layers_done())]
        sizes = assemble(self._source, self._partial, self._options, self._names, list(self._inputs()))
        self._partial.remove()
        number, whole = self._dtype.itemsize, ShardLayout()
        saved = weight_bytes(self._spec, whole, number) - weight_bytes(load_spec(self._partial.out), whole, number)
        return Summary(
            options=self._options,
            weights=[WeightFigures(**weight) for record in records for weight in record["weights"]],
            seconds=sum(record["seconds"] for record in records) + time.perf_counter() - begin,
            peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            layers=sizes.layers,
            model=sizes.model,
            calibrated_tokens=self._batches.tokens,
            kv_blocks=max(0, saved) // kv_bytes_per_block(self._spec, whole, BLOCK_SIZE, number),
        )


def _relative_difference(weight: Tensor, replacement: Tensor) -> float:
    return ((weight - replacement).norm() / weight.norm().clamp_min(1e-30)).item()


def _digest(sequences: Sequence[list[int]] | None) -> str | None:
    """A hash of the token ids."""
    if sequences is None:
        return None
    return hashlib.sha256(json.dumps(list(sequences)).encode()).hexdigest()
