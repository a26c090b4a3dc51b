"""Which part of a model a shard holds: tensor parallelism divides heads and widths, pipeline parallelism the layers.

rank = pp_rank * tp_size + tp_rank          -tp 2 -pp 2, 4 layers, 4 heads

          tp_rank 0            tp_rank 1
pp_rank 0 rank 0: layers 0-1   rank 1: layers 0-1     embedding
          heads 0-1            heads 2-3
pp_rank 1 rank 2: layers 2-3   rank 3: layers 2-3     final norm, output projection
          heads 0-1            heads 2-3
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from .errors import ConfigError
from .model_spec import ModelSpec
from .quantisation import Scheme


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """A shard's place in its replica."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    @property
    def rank(self) -> int:
        """Rank among all shards of the replica."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def world_size(self) -> int:
        """Number of shards of the replica."""
        return self.tp_size * self.pp_size

    @property
    def first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Holds the final norm and the output projection."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_output(self) -> bool:
        """Reports the sampled tokens."""
        return self.last_stage and self.tp_rank == 0

    def layers(self, spec: ModelSpec) -> range:
        """Contiguous decoder layers of this stage, as even as possible, and never most on the last of several stages.

        The last stage has the output projection besides, so the boundaries round up.
        """
        count, stage, stages = spec.num_layers, self.pp_rank, self.pp_size
        return range(-(-count * stage // stages), -(-count * (stage + 1) // stages))

    def num_heads(self, spec: ModelSpec) -> int:
        """Query heads of this shard."""
        return spec.num_heads // self.tp_size

    def num_kv_heads(self, spec: ModelSpec) -> int:
        """Key/value heads of this shard: at least one, so they are replicated where shards outnumber them."""
        return max(1, spec.num_kv_heads // self.tp_size)

    def first_kv_head(self, spec: ModelSpec) -> int:
        """Index in the model of this shard's first key/value head."""
        return self.tp_rank * spec.num_kv_heads // self.tp_size

    def share(self, width: int) -> int:
        """This shard's part of a dimension that tensor parallelism divides evenly."""
        return width // self.tp_size

    def padded_vocab_share(self, spec: ModelSpec) -> int:
        """Rows of the embedding and output projection on every shard; the last shard's may be padded with zeros."""
        return -(-spec.vocab_size // self.tp_size)

    def vocab(self, spec: ModelSpec) -> range:
        """Token ids whose rows this shard holds, without padding."""
        share = self.padded_vocab_share(spec)
        start = min(self.tp_rank * share, spec.vocab_size)
        return range(start, min(start + share, spec.vocab_size))


def all_layouts(tp: int, pp: int) -> list[ShardLayout]:
    """The layouts of a replica's shards, in rank order."""
    return [ShardLayout(t, tp, p, pp) for p in range(pp) for t in range(tp)]


def check_topology(spec: ModelSpec, tp: int, pp: int) -> None:
    """Refuse a division that does not come out even.

    Raises:
        ConfigError: names both numbers.
    """
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        raise ConfigError(
            f"tensor_parallel_size = {tp} does not fit {spec.num_kv_heads} KV heads: it must divide them or be a "
            f"multiple of them"
        )
    widths = {"attention heads": spec.num_heads, "intermediate size": spec.intermediate_size}
    if spec.moe is not None:
        widths["expert intermediate size"] = spec.moe.intermediate_size
        widths["shared expert intermediate size"] = spec.moe.shared_intermediate_size
    for what, width in widths.items():
        if width % tp:
            raise ConfigError(f"tensor_parallel_size = {tp} does not divide the model's {what} ({width})")
    if pp > spec.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size = {pp} exceeds the model's {spec.num_layers} layers: every stage needs one"
        )


SCALE_BYTES = 4
"""Of the scale of a head's key or value in a cache of 8 bits."""


def kv_bytes_per_block(
    spec: ModelSpec, layout: ShardLayout, block_size: int, dtype_bytes: int, kv_cache_dtype: str = "auto"
) -> int:
    """Bytes of one KV block on this shard: keys and values of its layers and heads for `block_size` tokens.

    Args:
        dtype_bytes: of a number that the shard computes with.
        kv_cache_dtype: "auto": the cache holds such numbers; "int8" or "fp8".
    """
    per_head = spec.head_dim * dtype_bytes if kv_cache_dtype == "auto" else spec.head_dim + SCALE_BYTES
    return len(layout.layers(spec)) * block_size * 2 * layout.num_kv_heads(spec) * per_head


class Matrix(NamedTuple):
    """A shard's part of a linear layer's weight."""

    module: str | None
    """In the checkpoint; None: a router, which is never used quantised."""
    out: int
    inputs: int
    stack: str
    """The weight that it is a part of: what reads the same input is one."""

    def scheme(self, spec: ModelSpec) -> Scheme | None:
        """How it is quantised; None: not at all."""
        if spec.quantisation is None or self.module is None:
            return None
        return spec.quantisation.scheme(self.module)


def layer_matrices(spec: ModelSpec, layout: ShardLayout, index: int) -> Iterator[Matrix]:
    """The weights of one decoder layer on this shard, without the gate of a shared expert."""
    naming, hidden, layer = spec.naming, spec.hidden_size, f"{spec.naming.prefixes[0]}layers.{index}."
    heads, kv_heads = (count * spec.head_dim for count in (layout.num_heads(spec), layout.num_kv_heads(spec)))
    if naming.fused_qkv:
        yield Matrix(f"{layer}self_attn.qkv_proj", heads + 2 * kv_heads, hidden, f"{layer}qkv")
    else:
        yield Matrix(f"{layer}self_attn.q_proj", heads, hidden, f"{layer}qkv")
        yield Matrix(f"{layer}self_attn.k_proj", kv_heads, hidden, f"{layer}qkv")
        yield Matrix(f"{layer}self_attn.v_proj", kv_heads, hidden, f"{layer}qkv")
    yield Matrix(f"{layer}self_attn.o_proj", hidden, heads, f"{layer}output")
    if not spec.layers[index].sparse or spec.moe is None:
        width = layout.share(spec.intermediate_size)
        if naming.fused_qkv:
            yield Matrix(f"{layer}mlp.gate_up_proj", 2 * width, hidden, f"{layer}gate_up")
            yield Matrix(f"{layer}mlp.down_proj", hidden, width, f"{layer}down")
        else:
            yield from _gated_mlp(f"{layer}mlp.", ("gate_proj", "up_proj", "down_proj"), width, hidden, layer)
        return
    moe, block = spec.moe, f"{layer}{naming.moe}."
    yield Matrix(None, moe.num_experts, hidden, f"{block}router")
    for expert in range(moe.num_experts):
        width = layout.share(moe.intermediate_size)
        yield from _gated_mlp(f"{block}experts.{expert}.", naming.experts, width, hidden, f"{block}experts.")
    if moe.shared_intermediate_size:
        names, width = ("gate_proj", "up_proj", "down_proj"), layout.share(moe.shared_intermediate_size)
        yield from _gated_mlp(f"{block}shared_expert.", names, width, hidden, f"{block}shared_expert.")


def _gated_mlp(prefix: str, names: tuple[str, str, str], width: int, hidden: int, stacks: str) -> Iterator[Matrix]:
    gate, up, down = names
    yield Matrix(f"{prefix}{gate}", width, hidden, f"{stacks}gate_up")
    yield Matrix(f"{prefix}{up}", width, hidden, f"{stacks}gate_up")
    yield Matrix(f"{prefix}{down}", hidden, width, f"{stacks}down")


def matrices(spec: ModelSpec, layout: ShardLayout) -> Iterator[Matrix]:
    """The weights of all linear layers on this shard; the output projection only where it is not the embedding."""
    for index in layout.layers(spec):
        yield from layer_matrices(spec, layout, index)
    if layout.last_stage and not spec.tie_word_embeddings:
        head = spec.naming.heads[0].removesuffix(".weight")
        yield Matrix(head, layout.padded_vocab_share(spec), spec.hidden_size, head)


def weight_bytes(spec: ModelSpec, layout: ShardLayout, dtype_bytes: int, *, expands_floats: bool = False) -> int:
    """Bytes of the weights that this shard holds in its device's memory (norms and biases are left out: < 0.1 %).

    Args:
        dtype_bytes: of a weight that is not quantised.
        expands_floats: weights of float8 are kept as if they were not quantised, as on a CPU.
    """
    linear = sum(
        matrix.out * matrix.inputs * dtype_bytes
        if scheme is None or (scheme.is_float and expands_floats)
        else scheme.nbytes(matrix.out, matrix.inputs)
        for matrix, scheme in _held(spec, layout)
    )
    tables = int(layout.first_stage)
    if layout.last_stage and spec.tie_word_embeddings and not layout.first_stage:
        tables += 1
    return linear + tables * layout.padded_vocab_share(spec) * spec.hidden_size * dtype_bytes


def quantised_layer_bytes(spec: ModelSpec, layout: ShardLayout, dtype_bytes: int = 2) -> tuple[int, int]:
    """What quantisation saves on this shard: bytes of the quantised layers, and of the same unquantised."""
    quantised = [(matrix, scheme) for matrix, scheme in _held(spec, layout) if scheme is not None]
    now = sum(scheme.nbytes(matrix.out, matrix.inputs) for matrix, scheme in quantised)
    return now, sum(matrix.out * matrix.inputs for matrix, _ in quantised) * dtype_bytes


def _held(spec: ModelSpec, layout: ShardLayout) -> Iterator[tuple[Matrix, Scheme | None]]:
    """Every matrix and how it is kept: unquantised where another part of its stack is quantised in another way, since a
    stack is one weight (`kernels/quantised_weight.py`, `stack_weights`)."""
    schemes: dict[str, set[Scheme | None]] = {}
    for matrix in matrices(spec, layout):
        schemes.setdefault(matrix.stack, set()).add(matrix.scheme(spec))
    for matrix in matrices(spec, layout):
        yield matrix, matrix.scheme(spec) if len(schemes[matrix.stack]) == 1 else None
