"""What a token costs: the price of a replica's time, shared among the tokens that it computes in it.

A replica that is busy computes steps of `base + prefill_token × p + decode_row × d` seconds (`StepCurve`). A token of
a prompt takes `prefill_token` of them. A generated token takes `decode_row`, and its share of `base`, which is paid
once per step (above all reading the weights) however many sequences are in it. Shared by as many as may run at once,
that is the cost at full load, which is when it matters who is sent where.
"""

from __future__ import annotations

import msgspec

from .model_spec import ModelSpec
from .replica_report import StepCurve
from .topology import ShardLayout, matrices, weight_bytes

BYTES_PER_SECOND = 3.35e12
"""Memory of the device that an estimate imagines: an H100 SXM (NVIDIA's data sheet)."""
FLOPS_PER_SECOND = 989e12
"""Its dense products in 16 bits."""
DOLLARS_PER_HOUR = 2.50
"""What renting one costs, about."""


class TokenPrices(msgspec.Struct, frozen=True):
    """Dollars per token of one model."""

    prompt: float
    output: float
    estimated: bool = False
    """From size and precision, and not from a price and a measurement: good for comparing models that are estimated
    alike, and for nothing else."""

    def cost(self, prompt_tokens: float, output_tokens: float) -> float:
        """Dollars of one request whose prompt is not cached."""
        return self.prompt * prompt_tokens + self.output * output_tokens


def token_prices(price_per_hour: float, curve: StepCurve, max_num_seqs: int, *, estimated: bool = False) -> TokenPrices:
    """Prices of a replica that costs `price_per_hour` dollars and has the step times `curve`.

    Args:
        max_num_seqs: sequences that share a step at full load.
        estimated: the price or the curve is no measured one.
    """
    per_second = price_per_hour / 3600
    output = curve.base / max_num_seqs + curve.decode_row
    return TokenPrices(per_second * curve.prefill_token, per_second * output, estimated)


def estimated_curve(spec: ModelSpec, dtype_bytes: int = 2) -> StepCurve:
    """Step times of the whole model on one imagined device (`BYTES_PER_SECOND`, `FLOPS_PER_SECOND`).

    A step reads every weight once: many rows together meet nearly all experts of a mixture. A row takes two operations
    per weight that it is multiplied with, which of a mixture are those of the experts that it is sent to. Attention
    and KV cache are left out, so long contexts come out too cheap, and of all models alike.

    Args:
        dtype_bytes: of a weight that is not quantised.
    """
    table = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size * dtype_bytes
    read = weight_bytes(spec, ShardLayout(), dtype_bytes) - table  # of an embedding only a few rows
    row = 2 * active_weights(spec) / FLOPS_PER_SECOND
    return StepCurve(read / BYTES_PER_SECOND, row, row)


def estimated_prices(spec: ModelSpec, dtype_bytes: int = 2, max_num_seqs: int = 64) -> TokenPrices:
    """Prices from size and precision alone: `estimated_curve` at `DOLLARS_PER_HOUR`."""
    return token_prices(DOLLARS_PER_HOUR, estimated_curve(spec, dtype_bytes), max_num_seqs, estimated=True)


def active_weights(spec: ModelSpec) -> float:
    """Weights that one token is multiplied with: the linear layers, of experts those that it is sent to, and the output
    projection, whether or not it is the embedding."""
    routed = 1.0 if spec.moe is None else spec.moe.experts_per_token / spec.moe.num_experts
    linear = sum(
        matrix.out * matrix.inputs * (routed if ".experts." in matrix.stack else 1.0)
        for matrix in matrices(spec, ShardLayout())
    )
    return linear + (spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings else 0)
