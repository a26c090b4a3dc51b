"""The compiled kernels behind the interface: they run at once, or are recorded while a program is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .attention_metadata import AttentionMetadata
from .interface import Plan, Rotation
from .native_library import (
    ACTIVATIONS,
    Add,
    AttentionOperation,
    Epilogue,
    Kind,
    LinearOperation,
    Operation,
    OperationList,
    RmsNorm,
    RotateStore,
    Step,
)
from .packed_weight import interleave_gate, pack, unpack_rows
from .program import NativePlan, NativeProgram


class NativeKernels:
    """See `interface.Kernels`; float32 or bfloat16 on CPUs."""

    def __init__(self) -> None:
        self._program: NativeProgram | None = None

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> NativeLinear:
        """See `interface.Kernels`."""
        return NativeLinear(self, weight, bias)

    def tied_linear(self, weight: Tensor) -> NativeLinear:
        """See `interface.Kernels`."""
        return NativeLinear(self, weight, None)

    def gated_linear(self, weight: Tensor, bias: Tensor | None, activation: str) -> NativeGatedLinear:
        """See `interface.Kernels`."""
        return NativeGatedLinear(self, weight, bias, activation)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, in_place: bool = False) -> Tensor:
        """See `interface.Kernels`."""
        out = x if in_place else self.temporary(x, x.shape[-1], x.dtype)
        assert weight.dtype == torch.float32
        operation = RmsNorm(
            Kind.RMS_NORM,
            is_bfloat16(x),
            x.shape[-1],
            eps,
            x.data_ptr(),
            out.data_ptr(),
            weight.data_ptr(),
            row_stride(x),
            row_stride(out),
        )
        self.emit(operation, len(x), x, out, weight)
        return out

    def add_(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Kernels`."""
        assert hidden.shape == x.shape
        operation = Add(
            Kind.ADD,
            is_bfloat16(x),
            x.shape[-1],
            alpha,
            x.data_ptr(),
            hidden.data_ptr(),
            row_stride(x),
            row_stride(hidden),
        )
        self.emit(operation, len(x), x, hidden)

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
    ) -> Tensor:
        """See `interface.Kernels`."""
        kv_heads, num_blocks, block_size, head_dim = k_cache.shape
        heads = qkv.shape[1] - 2 * kv_heads
        cos, sin = rotation
        assert qkv.is_contiguous()
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        assert cos.dtype == sin.dtype == torch.float32
        assert qkv.dtype == k_cache.dtype == v_cache.dtype
        operation = RotateStore(
            Kind.ROTATE_STORE,
            is_bfloat16(qkv),
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
        )
        self.emit(operation, plan, qkv, cos, sin, k_cache, v_cache, *(norms or ()))
        return qkv[:, :heads]

    def plan(self, metadata: AttentionMetadata, block_size: int) -> NativePlan:
        """See `interface.Kernels`."""
        return NativePlan(metadata)

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
    ) -> Tensor:
        """See `interface.Kernels`."""
        _, heads, head_dim = query.shape
        kv_heads, num_blocks, block_size, _ = k_cache.shape
        assert query.stride()[1:] == (head_dim, 1)
        assert query.dtype == k_cache.dtype == v_cache.dtype
        out = self.temporary(query, heads * head_dim, query.dtype)
        operation = AttentionOperation(
            Kind.ATTENTION,
            is_bfloat16(query),
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
        )
        self.emit(operation, plan, query, k_cache, v_cache, out)
        return out

    def on_host(self, function: Callable[[Tensor], Tensor], x: Tensor, *, in_place: bool = False) -> Tensor:
        """See `interface.Kernels`."""
        if self._program is None:
            return function(x)
        out = x if in_place else self.temporary(x, x.shape[-1], x.dtype)
        self._program.append_on_host(function, x, out)
        return out

    def begin_layer(self) -> None:
        """See `interface.Kernels`."""
        if self._program is not None:
            self._program.begin_layer()

    def new_program(self, max_rows: int) -> NativeProgram:
        """See `interface.Kernels`."""
        return NativeProgram(max_rows, self._record_to)

    def emit(self, operation: Operation, step: int | Plan, *tensors: Tensor | None) -> None:
        """Run an operation now, for a number of rows or for a plan, or record it."""
        if self._program is not None:
            self._program.append(operation, *tensors)
        elif isinstance(step, int):
            OperationList([operation]).run(Step(rows=step, threads=torch.get_num_threads()))
        else:
            assert isinstance(step, NativePlan)
            OperationList([operation]).run(step.step)

    def temporary(self, like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """[rows of `like`, width] for a result."""
        if self._program is not None:
            return self._program.temporary(width, dtype)
        return torch.empty(len(like), width, dtype=dtype)

    def _record_to(self, program: NativeProgram | None) -> None:
        self._program = program


class NativeLinear:
    """See `interface.Linear`."""

    def __init__(self, kernels: NativeKernels, weight: Tensor, bias: Tensor | None) -> None:
        self._kernels = kernels
        self._out_features, self._in_features = weight.shape
        self._weight = pack(weight)
        self._bias = padded_bias(bias)

    def __call__(self, x: Tensor) -> Tensor:
        out = self._kernels.temporary(x, self._out_features, x.dtype)
        self._run(x, out, Epilogue.STORE)
        return out

    def float32(self, x: Tensor) -> Tensor:
        """See `interface.Linear`."""
        out = self._kernels.temporary(x, self._out_features, torch.float32)
        self._run(x, out, Epilogue.STORE)
        return out

    def add_to(self, hidden: Tensor, x: Tensor, alpha: float) -> None:
        """See `interface.Linear`."""
        assert hidden.shape == (len(x), self._out_features)
        self._run(x, hidden, Epilogue.ADD_TO, alpha)

    def rows(self, indices: Tensor) -> Tensor:
        """See `interface.Linear`."""
        return unpack_rows(self._weight, indices, self._out_features, self._in_features)

    def _run(self, x: Tensor, out: Tensor, epilogue: Epilogue, alpha: float = 1.0) -> None:
        run_linear(
            self._kernels, x, self._weight, self._bias, out, epilogue, in_features=self._in_features, alpha=alpha
        )


class NativeGatedLinear:
    """The two halves of a gated MLP's first product, and what joins them, in one pass."""

    def __init__(self, kernels: NativeKernels, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        self._kernels = kernels
        self._activation = ACTIVATIONS[activation]
        self._width, self._in_features = len(weight) // 2, weight.shape[1]
        self._weight = pack(interleave_gate(weight))
        self._bias = None if bias is None else padded_bias(interleave_gate(bias))

    def __call__(self, x: Tensor) -> Tensor:
        out = self._kernels.temporary(x, self._width, x.dtype)
        run_linear(
            self._kernels,
            x,
            self._weight,
            self._bias,
            out,
            Epilogue.GATED,
            in_features=self._in_features,
            activation=self._activation,
        )
        return out


def run_linear(
    kernels: NativeKernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    epilogue: Epilogue,
    *,
    in_features: int,
    activation: int = 0,
    alpha: float = 1.0,
) -> None:
    """Emit a product of x [T, in_features] with a packed weight."""
    assert x.dtype == weight.dtype
    assert x.shape[1] == in_features
    operation = LinearOperation(
        Kind.LINEAR,
        is_bfloat16(x),
        in_features,
        out.shape[1],
        epilogue,
        activation,
        out.dtype == torch.float32 and x.dtype != torch.float32,
        alpha,
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        row_stride(x),
        row_stride(out),
    )
    kernels.emit(operation, len(x), x, weight, bias, out)


def padded_bias(bias: Tensor | None) -> Tensor | None:
    """float32, with zeros up to whole blocks, as the kernel reads it."""
    if bias is None:
        return None
    return torch.nn.functional.pad(bias.float(), (0, -len(bias) % 16)).contiguous()


def is_bfloat16(x: Tensor) -> bool:
    """Whether a kernel takes x for bfloat16; else it takes it for float32."""
    assert x.dtype in (torch.bfloat16, torch.float32)
    return x.dtype == torch.bfloat16


def row_stride(x: Tensor) -> int:
    """Elements between the rows of a matrix whose rows are contiguous."""
    assert x.dim() == 2
    assert x.stride(1) == 1
    return x.stride(0)
