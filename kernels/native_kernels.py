"""The compiled kernels behind the interface: they run at once, or are recorded while a program is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import moe
from .attention_metadata import AttentionMetadata
from .huge_pages import Arena
from .interface import Experts, ExpertWeights, Linear, Plan, Rotation
from .linear import PlainLinear
from .native_library import (
    ACTIVATIONS,
    UNPACKING_INSTRUCTION_SETS,
    Add,
    ArgMax,
    AttentionOperation,
    Embed,
    GatedActivation,
    Kind,
    Operation,
    OperationList,
    RmsNorm,
    RotateStore,
    RotationOperation,
    Step,
    Stored,
    instruction_set,
)
from .native_linear import LibraryLinear, NativeGatedLinear, NativeLinear
from .native_products import is_bfloat16, row_stride
from .packed_weight import PART_BYTES, PackedWeight, interleave_gate, pack
from .program import NativePlan, NativeProgram, spread_stride
from .quantised_stream import QuantisedStream, can_stream, make_stream
from .quantised_weight import QuantisedWeight, Weight
from .torch_kernels import TorchKernels


class NativeKernels:
    """See `interface.Kernels`; float32 or bfloat16 on CPUs."""

    steps_on_device = False

    def __init__(
        self, dtype: torch.dtype = torch.float32, *, compiled_products: bool = True, compress: bool | None = None
    ) -> None:
        """
        Args:
            dtype: of the weights.
            compiled_products: multiply with the compiled kernel too and not with torch's.
            compress: keep bfloat16 weights compressed, without loss; None: where that is fast.
        """
        if compress is None:
            compress = instruction_set() in UNPACKING_INSTRUCTION_SETS
        self._dtype = dtype
        self._compress = compress
        self._compiled_products = compiled_products
        self._program: NativeProgram | None = None
        self.arena = Arena()
        """The memory of the packed weights."""
        self.saved_bytes = 0
        self._kept = torch.empty(0)
        self._torch = TorchKernels(torch.device("cpu"), dtype)

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        """See `interface.Kernels`."""
        if isinstance(weight, QuantisedWeight):
            if can_stream(weight):
                return NativeLinear(self, self.stream(weight), bias)
            if weight.order is not None:
                return LibraryLinear(self, self._torch.linear(weight, bias), len(weight))
            weight = self._expanded(weight)
        if self._compiled_products:
            return NativeLinear(self, self.pack(weight), bias)
        return LibraryLinear(self, self._torch.linear(weight, bias), len(weight))

    def tied_linear(self, weight: Tensor) -> Linear:
        """See `interface.Kernels`."""
        if self._compiled_products:
            return NativeLinear(self, self.pack(weight), None)
        return self._torch.tied_linear(weight)

    def gated_linear(self, weight: Weight, bias: Tensor | None, activation: str) -> Callable[[Tensor], Tensor]:
        """See `interface.Kernels`."""
        if isinstance(weight, QuantisedWeight):
            if can_stream(weight):
                return NativeGatedLinear(self, self.stream(weight, gated=True), bias, activation, len(weight) // 2)
            if weight.order is None:
                weight = self._expanded(weight)
        if self._compiled_products and isinstance(weight, Tensor):
            packed = self.pack(interleave_gate(weight), weight.nbytes)
            return NativeGatedLinear(self, packed, bias, activation, len(weight) // 2)
        product = self.linear(weight, bias)
        return lambda x: self.gated_activation(product(x), activation)

    def gated_activation(self, x: Tensor, activation: str) -> Tensor:
        """[gate | up] [T, 2 * width] → activation(gate) * up [T, width]."""
        width = x.shape[1] // 2
        out = self.temporary(x, width, x.dtype, spread=True)
        operation = GatedActivation(
            Kind.GATED_ACTIVATION,
            is_bfloat16(x.dtype),
            width,
            ACTIVATIONS[activation],
            x.data_ptr(),
            out.data_ptr(),
            row_stride(x),
            row_stride(out),
        )
        self._emit(operation, self._step(len(x)), x, out)
        return out

    def route(self, logits: Tensor, experts_per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
        """See `interface.Kernels`."""
        return moe.route(logits, experts_per_token, normalize)

    def experts(self, gate_up: ExpertWeights, down: ExpertWeights, activation: str) -> Experts:
        """See `interface.Kernels`."""
        return moe.ProductsOfExperts(self, gate_up, down, activation)

    def embed(self, embedding: Linear, tokens: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """See `interface.Kernels`."""
        assert isinstance(embedding, NativeLinear | PlainLinear)
        table = embedding.weight
        assert isinstance(table, PackedWeight | Tensor)
        packed = table if isinstance(table, PackedWeight) else None
        weight = table if isinstance(table, Tensor) else table.data
        dtype, width = table.dtype, table.shape[1]
        assert weight.is_contiguous()
        if out is None:
            out = self.temporary(tokens, width, dtype)
        operation = Embed(
            Kind.EMBED,
            is_bfloat16(dtype),
            width,
            packed is not None,
            packed is not None and packed.compressed,
            scale,
            weight.data_ptr(),
            out.data_ptr(),
            row_stride(out),
        )
        self._emit(operation, self._step(len(tokens), tokens=tokens.data_ptr()), weight, out)
        return out

    def rotation(
        self, positions: Tensor, inverse_frequencies: Tensor, factor: float, out: Rotation | None = None
    ) -> Rotation:
        """See `interface.Kernels`."""
        if inverse_frequencies.dim() > 1:
            assert self._program is None, "frequencies that depend on the position cannot be recorded"
            return self._torch.rotation(positions, inverse_frequencies, factor, out)
        width = len(inverse_frequencies)
        if out is None:
            out = (
                self.temporary(positions, width, torch.float32),
                self.temporary(positions, width, torch.float32),
            )
        cos, sin = out
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        operation = RotationOperation(
            Kind.ROTATION, width, factor, inverse_frequencies.data_ptr(), cos.data_ptr(), sin.data_ptr()
        )
        step = self._step(len(positions), positions=positions.data_ptr())
        self._emit(operation, step, inverse_frequencies, cos, sin)
        return cos, sin

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, in_place: bool = False, rows: Tensor | None = None
    ) -> Tensor:
        """See `interface.Kernels`."""
        count = len(x if rows is None else rows)
        if in_place:
            out = x
        else:
            out = self.temporary(x if rows is None else rows, x.shape[-1], x.dtype, spread=True)
        assert weight.dtype == torch.float32
        operation = RmsNorm(
            Kind.RMS_NORM,
            is_bfloat16(x.dtype),
            x.shape[-1],
            eps,
            x.data_ptr(),
            out.data_ptr(),
            weight.data_ptr(),
            None if rows is None else rows.data_ptr(),
            row_stride(x),
            row_stride(out),
        )
        self._emit(operation, self._step(count), x, out, weight, rows)
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """See `interface.Kernels`."""
        assert logits.dtype == torch.float32
        out = torch.empty(len(logits), dtype=torch.int64)
        operation = ArgMax(Kind.ARGMAX, logits.shape[1], logits.data_ptr(), out.data_ptr(), row_stride(logits))
        self._emit(operation, self._step(len(logits)), logits, out)
        return out

    def add_(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Kernels`."""
        assert hidden.shape == x.shape
        operation = Add(
            Kind.ADD,
            is_bfloat16(x.dtype),
            x.shape[-1],
            alpha,
            x.data_ptr(),
            hidden.data_ptr(),
            row_stride(x),
            row_stride(hidden),
        )
        self._emit(operation, self._step(len(x)), x, hidden)

    def add_norm(self, hidden: Tensor, x: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        """See `interface.Kernels`."""
        self.add_(hidden, x, alpha)
        return self.rms_norm(hidden, weight, eps)

    def rotate_and_store(
        self,
        qkv: Tensor,
        rotation: Rotation,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Plan,
        *,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `interface.Kernels`."""
        kv_heads, num_blocks, block_size, head_dim = k_cache.shape
        heads = qkv.shape[1] - 2 * kv_heads
        cos, sin = rotation
        assert qkv.is_contiguous()
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        assert cos.dtype == sin.dtype == torch.float32
        assert k_cache.dtype == v_cache.dtype
        operation = RotateStore(
            Kind.ROTATE_STORE,
            is_bfloat16(qkv.dtype),
            heads,
            kv_heads,
            head_dim,
            2 * cos.shape[-1],
            block_size,
            eps,
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            norms[0].data_ptr() if norms else None,
            norms[1].data_ptr() if norms else None,
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            qkv.stride(0),
            num_blocks,
            *scale_addresses(scales),
            stored_as(k_cache, qkv.dtype, scales),
        )
        assert isinstance(plan, NativePlan)
        self._emit(operation, plan.step, qkv, cos, sin, k_cache, v_cache, *(norms or ()), *(scales or ()))
        return qkv[:, :heads]

    def plan(self, metadata: AttentionMetadata, block_size: int, tokens: Tensor | None = None) -> NativePlan:
        """See `interface.Kernels`."""
        return NativePlan(metadata, tokens)

    def attention(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Plan,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `interface.Kernels`."""
        _, heads, head_dim = query.shape
        kv_heads, num_blocks, block_size, _ = k_cache.shape
        assert query.stride()[1:] == (head_dim, 1)
        assert k_cache.dtype == v_cache.dtype
        out = self.temporary(query, heads * head_dim, query.dtype, spread=True)
        operation = AttentionOperation(
            Kind.ATTENTION,
            is_bfloat16(query.dtype),
            heads,
            kv_heads,
            head_dim,
            block_size,
            window or 0,
            scale,
            softcap or 0.0,
            query.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            query.stride(0),
            out.stride(0),
            num_blocks,
            *scale_addresses(scales),
            stored_as(k_cache, query.dtype, scales),
        )
        assert isinstance(plan, NativePlan)
        self._emit(operation, plan.step, query, k_cache, v_cache, out, *(scales or ()))
        return out

    def on_host(
        self, function: Callable[[Tensor], Tensor], x: Tensor, *, in_place: bool = False, width: int | None = None
    ) -> Tensor:
        """See `interface.Kernels`; `width` is that of the result if it is another."""
        if self._program is None:
            return function(x)
        out = x if in_place else self.temporary(x, width or x.shape[-1], x.dtype)
        self._program.append_on_host(function, x, out)
        return out

    def begin_layer(self) -> None:
        """See `interface.Kernels`."""
        if self._program is not None:
            self._program.begin_layer()

    def new_program(self, max_rows: int) -> NativeProgram:
        """See `interface.Kernels`."""
        return NativeProgram(max_rows, self._record_to)

    def pack(self, weight: Tensor, given_bytes: int | None = None) -> PackedWeight:
        """A weight for the compiled product; `given_bytes` of it were taken over if it has been padded since."""
        packed = pack(weight, self.arena, compress=self._compress)
        self.saved_bytes += (weight.nbytes if given_bytes is None else given_bytes) - packed.data.nbytes
        return packed

    def stream(self, weight: QuantisedWeight, *, gated: bool = False) -> QuantisedStream:
        """A quantised weight for the compiled product."""
        stream = make_stream(weight, self.arena, gated=gated)
        self.saved_bytes += weight.nbytes - stream.data.nbytes
        return stream

    def _expanded(self, weight: QuantisedWeight) -> Tensor:
        """A weight that the compiled product does not read in few bits, as it would be without quantisation."""
        expanded = torch.empty(weight.shape, dtype=self._dtype)
        at_once = max(1, PART_BYTES // (4 * weight.shape[1]))  # so that what lies beside it is small
        for first in range(0, len(weight), at_once):
            rows = slice(first, first + at_once)
            expanded[rows] = weight.rows(rows).dequantise(self._dtype)
        self.saved_bytes += weight.nbytes - expanded.nbytes
        return expanded

    def run_rows(self, operation: Operation, rows: int, *tensors: Tensor | None) -> None:
        """Run an operation that needs no more of a step than its number of rows, now, or record it."""
        self._emit(operation, self._step(rows), *tensors)

    def _emit(self, operation: Operation, step: Step, *tensors: Tensor | None) -> None:
        if self._program is not None:
            self._program.append(operation, *tensors)
        else:
            OperationList([operation]).run(step)

    def _step(self, rows: int, **pointers: int) -> Step:
        return Step(rows=rows, threads=torch.get_num_threads(), **pointers)

    def temporary(self, like: Tensor, width: int, dtype: torch.dtype, *, spread: bool = False) -> Tensor:
        """[rows of `like`, width] for a result; `spread` as in `NativeProgram.temporary`."""
        spread = spread and self._compiled_products  # torch's would make rows contiguous again
        if self._program is not None:
            return self._program.temporary(width, dtype, spread=spread)
        stride = spread_stride(width, dtype) if spread else width
        return torch.empty(len(like), stride, dtype=dtype)[:, :width]

    def workspace(self, like: Tensor, row_bytes: int) -> Tensor:
        """Memory of an operation for `row_bytes` per row of `like`, from where each row begins `spread_stride` on."""
        stride = spread_stride(row_bytes, torch.uint8)
        if self._program is not None:
            return self._program.temporary(stride, torch.uint8)
        return torch.empty(len(like) * stride, dtype=torch.uint8)

    def kept(self, like: Tensor, width: int) -> Tensor:
        """[rows of `like`, width] float32, the same memory in every call: logits are megabytes, and a new tensor would
        be new pages in every step."""
        count = len(like) * width
        if len(self._kept) < count:
            self._kept = torch.empty(count)
        return self._kept[:count].view(len(like), width)

    def _record_to(self, program: NativeProgram | None) -> None:
        self._program = program


def stored_as(cache: Tensor, computed: torch.dtype, scales: tuple[Tensor, Tensor] | None) -> Stored:
    """What a cache for kernels that compute in `computed` holds."""
    if scales is None:
        assert cache.dtype == computed
        return Stored.AS_COMPUTED
    assert all(part.is_contiguous() and part.dtype == torch.float32 for part in scales)
    assert all(part.shape == cache.shape[:3] for part in scales)
    return {torch.int8: Stored.INT8, torch.float8_e4m3fn: Stored.FLOAT8}[cache.dtype]


def scale_addresses(scales: tuple[Tensor, Tensor] | None) -> tuple[int | None, int | None]:
    """Of the scales of keys and of values."""
    return (None, None) if scales is None else (scales[0].data_ptr(), scales[1].data_ptr())
