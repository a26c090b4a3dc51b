"""What a quantised matrix [out, in] consists of in a checkpoint, and how its numbers are found in there.

    GPTQ     qweight [words of in, out]   qzeros [groups, words of out]        scales [groups, out]   g_idx [in]
    AWQ      qweight [in, words of out]   qzeros [groups, words of out]        scales [groups, out]
    packed   weight_packed [out, words of in]   weight_zero_point [words of out, groups]
             weight_scale [out, groups]         weight_g_idx [in]
    plain    weight [out, in]   weight_zero_point [out, groups]   weight_scale or weight_scale_inv [out, groups]

A plain scale may be shared by several rows or by all. Sources: gptqmodel/nn_modules/qlinear (`pack_original`),
awq/modules/linear/gemm.py (`WQLinear_GEMM`), compressed_tensors/compressors, transformers'
integrations/finegrained_fp8.py.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..cluster.errors import CheckpointError
from ..cluster.quantisation import Layout, Scheme
from ..kernels.quantised_weight import QuantisedWeight
from .checkpoint import FLOATS, Checkpoint
from .column_groups import StoredGroups, quantised_weight
from .packed_integers import PER_RUN, nibbles, num_words, unpack, words_of
from .weight_names import TensorSlice

_INT = (torch.int32,)
_INDICES = (torch.int32, torch.int64)
_SCALES = (*FLOATS, torch.float8_e8m0fnu)
_ONE_MORE = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in every integer of a word, by bits."""
ACTIVATIONS = {None: None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What `Scheme.activations` names."""
_AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Which of a word's nibbles, counted from the lowest, holds its first output, its second, ..."""

MAIN_TENSORS = {
    Layout.GPTQ: "qweight",
    Layout.GPTQ_V2: "qweight",
    Layout.AWQ: "qweight",
    Layout.PACKED: "weight_packed",
    Layout.PLAIN: "weight",
}
"""The name of the integers, below the module's."""


@dataclasses.dataclass(frozen=True, slots=True)
class QuantisedSlice:
    """Rows and columns of a quantised matrix: which parts of which tensors are needed, and what they make."""

    module: str
    scheme: Scheme
    out: slice
    inputs: slice
    group_size: int
    groups: slice
    """Of the inputs; all where the checkpoint says to which each belongs."""
    parts: dict[str, TensorSlice]
    """By the tensor's name below the module's."""

    def weight(self, tensors: dict[str, Tensor]) -> QuantisedWeight:
        """The slice as kernels take it, on the tensors' device.

        Args:
            tensors: the contents of `parts`.

        Raises:
            CheckpointError: an input belongs to a group that there is not.
        """
        if self.scheme.layout in (Layout.PACKED, Layout.PLAIN):
            values, scales, zeros = _row_major(self, tensors)
        else:
            values, scales, zeros = _transposed(self, tensors)
        return quantised_weight(
            StoredGroups(
                values=values,
                scales=scales if scales.dtype in (torch.float16, torch.bfloat16) else scales.float(),
                zeros=zeros,
                bits=self.scheme.bits,
                group_size=self.group_size,
                first_column=self.inputs.start - self.groups.start * self.group_size,
                group_of=_group_of(self, tensors),
                activations=ACTIVATIONS[self.scheme.activations],
                nibbles=values.shape[1] < self.inputs.stop - self.inputs.start,
            )
        )


def plan_slice(piece: TensorSlice, scheme: Scheme, checkpoint: Checkpoint) -> QuantisedSlice:
    """What to read of a matrix.

    Args:
        piece: of the matrix as if it were not quantised, `{module}.weight`.

    Raises:
        CheckpointError: the config says that it is quantised, but the checkpoint holds it otherwise.
    """
    module = piece.name.removesuffix(".weight")
    _check_quantised(module, scheme, checkpoint)
    inputs = slice(0, piece.shape[1]) if piece.columns is None else piece.columns
    group_size = min(scheme.group_size or piece.shape[1], piece.shape[1])
    named_groups = _first_name(module, ("g_idx", "weight_g_idx"), checkpoint)
    if scheme.act_order and named_groups is None:
        checkpoint.find(f"{module}.{'weight_g_idx' if scheme.layout is Layout.PACKED else 'g_idx'}")
    first, last = inputs.start // group_size, -(-inputs.stop // group_size)
    groups = slice(first, last) if named_groups is None else slice(0, -(-piece.shape[1] // group_size))
    partial = QuantisedSlice(module, scheme, piece.rows, inputs, group_size, groups, {})
    find = _find_row_major if scheme.layout in (Layout.PACKED, Layout.PLAIN) else _find_transposed
    parts = find(partial, piece.shape[0], piece.shape[1], checkpoint)
    if named_groups is not None:
        parts[named_groups] = TensorSlice(f"{module}.{named_groups}", piece.shape[1:], inputs, dtypes=_INDICES)
    return dataclasses.replace(partial, parts=parts)


def is_plain(piece: TensorSlice, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds a matrix that is not quantised, whatever the config says."""
    return piece.name in checkpoint and checkpoint.find(piece.name).dtype in FLOATS


def _check_quantised(module: str, scheme: Scheme, checkpoint: Checkpoint) -> None:
    plain = f"{module}.weight"
    stored = checkpoint.find(plain) if plain in checkpoint else None
    if stored is not None and stored.dtype in FLOATS:
        raise CheckpointError(
            f"{stored.path}: tensor {plain} is not quantised, but config.json says that it is ({scheme.label}): name "
            f"{module} among the modules that its quantization_config leaves out"
        )
    checkpoint.find(f"{module}.{MAIN_TENSORS[scheme.layout]}")


def _first_name(module: str, names: tuple[str, ...], checkpoint: Checkpoint) -> str | None:
    return next((name for name in names if f"{module}.{name}" in checkpoint), None)


def _find_transposed(part: QuantisedSlice, out: int, inputs: int, checkpoint: Checkpoint) -> dict[str, TensorSlice]:
    """GPTQ and AWQ."""
    scheme, module, bits = part.scheme, part.module, part.scheme.bits
    num_groups, packed_out = -(-inputs // part.group_size), words_of(part.out, bits)
    out_words = num_words(out, bits)
    if scheme.layout is Layout.AWQ:
        shape, rows, columns = (inputs, out_words), part.inputs, packed_out
    else:
        shape, rows, columns = (num_words(inputs, bits), out), words_of(part.inputs, bits), part.out
    parts = {
        "qweight": TensorSlice(f"{module}.qweight", shape, rows, columns, _INT),
        "scales": TensorSlice(f"{module}.scales", (num_groups, out), part.groups, part.out, _SCALES),
    }
    if not scheme.symmetric or f"{module}.qzeros" in checkpoint:
        parts["qzeros"] = TensorSlice(f"{module}.qzeros", (num_groups, out_words), part.groups, packed_out, _INT)
    return parts


def _transposed(part: QuantisedSlice, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values as `StoredGroups` has them, scales and zero points [out, groups]."""
    bits, layout, zeros = part.scheme.bits, part.scheme.layout, tensors.get("qzeros")
    scales = tensors["scales"].T
    if layout is Layout.AWQ:
        zeros = _unpack_awq(zeros, part.out).T if zeros is not None else None
        return _awq_values(tensors["qweight"], part.out), scales, zeros
    values = _along_inputs(tensors["qweight"].T, bits, part.inputs)
    if zeros is None:
        return values, scales, None
    if layout is Layout.GPTQ and bits in _ONE_MORE:
        # As words: where a zero point of 0 was stored, its neighbour lent it a one.
        zeros = zeros + _ONE_MORE[bits]
    unpacked = unpack(zeros, bits, part.out).T
    if layout is Layout.GPTQ and bits not in _ONE_MORE:
        unpacked = (unpacked + 1) & ((1 << bits) - 1)
    return values, scales, unpacked


def _along_inputs(words: Tensor, bits: int, inputs: slice) -> Tensor:
    """[out, words] → values, packed as they are where kernels take them so."""
    packed = nibbles(words, inputs) if bits == 4 else None
    return unpack(words, bits, inputs) if packed is None else packed


def _awq_values(words: Tensor, out: slice) -> Tensor:
    """[in, words] → values."""
    if len(words) % 2:
        return _unpack_awq(words, out).T
    # [byte of a word, words, pairs of inputs]: the low half of an integer is the first input's byte.
    octets = words.T.contiguous().view(torch.uint8).unflatten(1, (-1, 4)).permute(2, 0, 1).contiguous()
    pairs = octets.view(torch.int16)
    packed = torch.empty((words.shape[1], 8, len(words) // 2), dtype=torch.uint8, device=words.device)
    for column, nibble in enumerate(_AWQ_NIBBLES):
        pair = pairs[nibble // 2]
        if nibble % 2:
            packed[:, column] = ((pair >> 4) & 0x0F) | ((pair >> 8) & 0xF0)
        else:
            packed[:, column] = (pair & 0x0F) | ((pair >> 4) & 0xF0)
    skipped = out.start % PER_RUN
    return packed.flatten(0, 1)[skipped : skipped + out.stop - out.start]


def _unpack_awq(words: Tensor, out: slice) -> Tensor:
    """[rows, words] → [rows, outputs]."""
    nibbles = unpack(words, 4, slice(0, 8 * words.shape[1]))
    in_order = nibbles.unflatten(1, (-1, 8))[..., _AWQ_NIBBLES].flatten(1)
    skipped = out.start % PER_RUN
    return in_order[:, skipped : skipped + out.stop - out.start]


def _find_row_major(part: QuantisedSlice, out: int, inputs: int, checkpoint: Checkpoint) -> dict[str, TensorSlice]:
    """compressed-tensors and fp8."""
    scheme, module, bits = part.scheme, part.module, part.scheme.bits
    if scheme.layout is Layout.PACKED:
        shape, columns = (out, num_words(inputs, bits)), words_of(part.inputs, bits)
        values = TensorSlice(f"{module}.weight_packed", shape, part.out, columns, _INT)
    else:
        dtypes = (torch.float8_e4m3fn,) if scheme.is_float else (torch.int8,)
        values = TensorSlice(f"{module}.weight", (out, inputs), part.out, part.inputs, dtypes)
    name = _first_name(module, ("weight_scale", "weight_scale_inv"), checkpoint) or "weight_scale"
    parts = {values.name.removeprefix(f"{module}."): values, name: _find_scales(part, name, out, inputs, checkpoint)}
    if not scheme.symmetric:
        scales = parts[name]
        zeros = dataclasses.replace(scales, name=f"{module}.weight_zero_point", dtypes=(torch.int8,))
        if scheme.layout is Layout.PACKED and scheme.rows_per_scale == 1:
            packed = (num_words(out, bits), *scales.shape[1:])
            zeros = TensorSlice(zeros.name, packed, words_of(part.out, bits), zeros.columns, _INT)
        parts["weight_zero_point"] = zeros
    return parts


def _find_scales(part: QuantisedSlice, name: str, out: int, inputs: int, checkpoint: Checkpoint) -> TensorSlice:
    """Scales of one group per row may be a vector, one in all a number."""
    full = f"{part.module}.{name}"
    stored = checkpoint.find(full).shape
    shared, num_groups = part.scheme.rows_per_scale, -(-inputs // part.group_size)
    if shared is None or (stored and stored[0] == out and num_groups == 1):
        height = stored[0] if stored and stored[0] == out else 1
    else:
        height = -(-out // shared)
    if height == out:
        rows = part.out
    elif shared is None:
        rows = slice(0, 1)
    else:
        rows = slice(part.out.start // shared, -(-part.out.stop // shared))
    shape: tuple[int, ...] = (height, num_groups)
    if num_groups == 1 and stored in ((height,), () if height == 1 else (height,)):
        return TensorSlice(full, stored, rows, dtypes=_SCALES)
    return TensorSlice(full, shape, rows, part.groups, _SCALES)


def _row_major(part: QuantisedSlice, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values as `StoredGroups` has them, scales and zero points [out, groups]."""
    scheme, rows = part.scheme, part.out.stop - part.out.start
    scales = tensors["weight_scale"] if "weight_scale" in tensors else tensors["weight_scale_inv"]
    zeros = tensors.get("weight_zero_point")
    middle = 1 << (scheme.bits - 1)
    if scheme.layout is Layout.PACKED:
        values = _along_inputs(tensors["weight_packed"], scheme.bits, part.inputs)
        if zeros is not None and scheme.rows_per_scale == 1:
            zeros = unpack(zeros.reshape(len(zeros), -1).T, scheme.bits, part.out).T
        elif zeros is not None:
            zeros = (zeros.to(torch.int16) + middle).to(torch.uint8)
    elif scheme.is_float:
        return tensors["weight"], _of_every_row(part, scales, rows), None
    else:
        values = _unsigned(tensors["weight"], middle)
        zeros = _unsigned(zeros, middle) if zeros is not None else None
    return values, _of_every_row(part, scales, rows), _of_every_row(part, zeros, rows) if zeros is not None else None


def _unsigned(signed: Tensor, middle: int) -> Tensor:
    """Signed integers with `middle` added, as uint8: the sum of bytes, which may go around once."""
    return signed.view(torch.uint8) + middle


def _of_every_row(part: QuantisedSlice, shared: Tensor, rows: int) -> Tensor:
    """[rows that have their own, groups] → [out, groups]."""
    shared = shared.reshape(-1, part.groups.stop - part.groups.start)
    if len(shared) == rows:
        return shared
    if len(shared) == 1:
        return shared.expand(rows, -1)
    height = part.scheme.rows_per_scale
    assert height is not None
    index = torch.arange(part.out.start, part.out.stop, device=shared.device) // height
    return shared[index - part.out.start // height]


def _group_of(part: QuantisedSlice, tensors: dict[str, Tensor]) -> Tensor | None:
    """The group of every input as stored, on the CPU."""
    stored = tensors.get("g_idx", tensors.get("weight_g_idx"))
    if stored is None:
        return None
    groups = stored.cpu().long()
    if int(groups.min()) < 0 and int(groups.max()) < 0:  # compressed-tensors: they follow one another
        return None
    outside = groups[(groups < 0) | (groups >= part.groups.stop)]
    if len(outside):
        name = "g_idx" if "g_idx" in tensors else "weight_g_idx"
        raise CheckpointError(
            f"tensor {part.module}.{name} names group {int(outside[0])}, but config.json implies groups 0 to "
            f"{part.groups.stop - 1}"
        )
    return groups
