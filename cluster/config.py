"""What a user may configure, checked before anything starts.

One `ServeConfig` describes a whole application; the command line and a YAML file are two ways to write it. Every
message names the field, the value and what is allowed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import ConfigError
from .router_config import RouterConfig
from .strict_model import StrictModel

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "t": 10**12}


def parse_bytes(value: object) -> object:
    """`"2GiB"`, `"512MiB"`, `"1.5g"` or a number of bytes to an int; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", value.lower())
    if match is None:
        raise ValueError("not a memory size; write a number with a unit, such as 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class ModelConfig(StrictModel):
    """One served model. Field names are those of vLLM's flags."""

    model: str
    """A folder in Hugging Face format or a hub id."""
    served_model_name: str | None = None
    """Name in the API; default: the folder's or the hub id's last part."""
    tensor_parallel_size: int = Field(1, ge=1, le=64)
    pipeline_parallel_size: int = Field(1, ge=1, le=64)
    replicas: int = Field(1, ge=1, le=1024)
    """At the start; the number stays if neither of the next two is given."""
    min_replicas: int | None = Field(None, ge=1, le=1024)
    max_replicas: int | None = Field(None, ge=1, le=1024)
    """Bounds of autoscaling (`cluster/autoscaling.py`); one that is not given is `replicas`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    """Where weights come from; "dummy": random ones of the right shapes, so that config.json suffices."""
    allow_unevaluated: bool = False
    """Serve a variant, quantised or with an 8-bit KV cache, although `troupe eval` has not found it good enough."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest prompt and output together; default: the model's context."""
    max_num_seqs: int = Field(64, ge=1, le=4096)
    """Sequences that run at once."""
    max_num_batched_tokens: int = Field(1024, ge=16, le=1_048_576)
    """Tokens computed in one step; longer prompts are computed in chunks."""
    max_num_waiting: int = Field(1024, ge=1)
    """Requests that may wait; one more is refused with 429."""
    block_size: int = Field(16, ge=4, le=256)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Part of a GPU's memory that may be in use in the end, weights, a step and KV cache together."""
    kv_cache_memory: Bytes | None = None
    """Bytes per shard; default: what is left on the device."""
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """What keys and values are stored in; "auto": what the model computes in. With 8 bits every head of a token has a
    scale."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    enable_prefix_caching: bool = True
    num_threads: int | None = Field(None, ge=1, le=256)
    """CPU threads per shard; default: as many as its share of the node's cores (`cluster/cpu_plan.py`)."""
    price_per_hour: float | None = Field(None, gt=0)
    """Dollars that one replica costs; default: estimated from the size of the weights (`cluster/price.py`)."""

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two")
        return value

    @model_validator(mode="before")
    @classmethod
    def _starts_with_the_least(cls, data: Any) -> Any:
        """Without `replicas`, a model with `min_replicas` starts with those."""
        least = data.get("min_replicas") if isinstance(data, dict) else None
        if isinstance(least, int) and least >= 1 and "replicas" not in data:
            return {**data, "replicas": least}
        return data

    @model_validator(mode="after")
    def _replicas_are_within_bounds(self) -> ModelConfig:
        least, most = self.min_replicas, self.max_replicas
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_replicas ({least}) must be at most max_replicas ({most})")
        if least is not None and self.replicas < least:
            raise ValueError(
                f"replicas ({self.replicas}), with which the model starts, must be at least min_replicas ({least}); "
                "leave replicas out to start with min_replicas"
            )
        if most is not None and self.replicas > most:
            raise ValueError(
                f"replicas ({self.replicas}), with which the model starts, must be at most max_replicas ({most})"
            )
        return self

    @model_validator(mode="after")
    def _budget_fits_sequences(self) -> ModelConfig:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running sequence can take one token per step"
            )
        return self

    @property
    def name(self) -> str:
        """Name in the API."""
        return self.served_model_name or Path(self.model.rstrip("/")).name

    @property
    def replica_bounds(self) -> tuple[int, int] | None:
        """Least and most replicas; None: their number is fixed."""
        if self.min_replicas is None and self.max_replicas is None:
            return None
        return self.min_replicas or self.replicas, self.max_replicas or self.replicas

    @property
    def shards_per_replica(self) -> int:
        """Shard actors of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class ServeConfig(StrictModel):
    """A whole application: its address and its models."""

    models: list[ModelConfig] = Field(min_length=1)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    dashboard_port: int = Field(8265, ge=1, le=65535)
    ingress_replicas: int = Field(1, ge=1, le=256)
    max_body_bytes: Bytes = 8 * 2**20
    """Larger request bodies are refused with 413."""
    router: RouterConfig = RouterConfig()
    """Which model and replica answer."""

    @model_validator(mode="after")
    def _distinct_ports(self) -> ServeConfig:
        if self.port == self.dashboard_port:
            raise ValueError(
                f"port and dashboard_port are both {self.port}; the API and Ray's dashboard need one each, so choose "
                "another --port or --dashboard-port"
            )
        return self

    @model_validator(mode="after")
    def _unique_names(self) -> ServeConfig:
        names = [model.name for model in self.models]
        if strange := [name for name in names if not (name.isascii() and name.isprintable())]:
            raise ValueError(
                f"the name {strange[0]!r} has characters that Ray's metrics and HTTP headers cannot carry; give the "
                "model a served_model_name of printable ASCII characters"
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"models share the name {twice[0]!r}; give each its own served_model_name")
        self.router.check_models(names)
        return self


def load_config(data: dict[str, Any]) -> ServeConfig:
    """Check `data` (from YAML or the command line) and build the configuration.

    Raises:
        ConfigError: one line per fault, each naming the field, the value and what is allowed.
    """
    try:
        return ServeConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Any) -> str:
    """One line for one pydantic fault."""
    field = ".".join(str(part) for part in fault["loc"]) or "configuration"
    if fault["type"] == "extra_forbidden":
        return f"{field}: unknown field (value {fault['input']!r}); known: {', '.join(_known_fields(fault['loc']))}"
    if fault["type"] == "missing":
        return f"{field}: required and not given"
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(fault["input"], dict | list | BaseModel):
        return f"{field}: {message}"
    return f"{field} = {fault['input']!r}: {message}"


def _known_fields(location: tuple[str | int, ...]) -> list[str]:
    """Fields of the object in which an unknown one lies at `location`."""
    found: Any = ServeConfig
    for part in location[:-1]:
        if part in getattr(found, "model_fields", {}):
            found = found.model_fields[part].annotation
        while get_args(found):  # an element of a list, dict or union
            found = [kind for kind in get_args(found) if kind not in (str, type(None))][-1]
    return list(found.model_fields)
