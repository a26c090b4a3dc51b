"""docs/configuration.md lists exactly the fields that exist, with their defaults and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from raytroupe.cluster.config import ModelConfig, ServeConfig
from raytroupe.cluster.router_config import (
    CostWeights,
    EscalationConfig,
    LatencyClassConfig,
    RouterConfig,
    RuleConfig,
)
from raytroupe.deploy.cli import cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def documented(heading: str) -> dict[str, tuple[str, str]]:
    """Field name to (default, allowed) in the table below a heading."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): (row[1].strip(), row[2].strip()) for row in rows}


def defined(model: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """The same from the model itself."""
    schema = model.model_json_schema()
    kinds = {f"#/$defs/{name}": "settings" for name in schema.get("$defs", {})}
    return {
        name: (
            default_cell(field, required=name in schema.get("required", ())),
            allowed_cell(field.get("anyOf", [field])[0], kinds),
        )
        for name, field in schema["properties"].items()
    }


def default_cell(field: dict[str, Any], *, required: bool) -> str:
    if "default" not in field:
        return "required" if required else "none"
    default = field["default"]
    if isinstance(default, str):
        return f"`{default}`"
    if isinstance(default, dict):
        return "as below"
    return {"None": "none", "True": "true", "False": "false"}.get(str(default), str(default))


def allowed_cell(field: dict[str, Any], kinds: dict[str, str]) -> str:
    if "$ref" in field:
        return kinds[field["$ref"]]
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "exclusiveMinimum" in field or "gt" in field:
        least = f"more than {field.get('exclusiveMinimum', field.get('gt'))}"
        return f"{least}, at most {field['maximum']:g}" if "maximum" in field else least
    if "maximum" in field and "minimum" not in field:
        return f"at most {field['maximum']:g}"
    if "maximum" in field:
        return f"{field['minimum']} – {field['maximum']}"
    if "minimum" in field:
        return f"at least {field['minimum']}"
    return {"string": "text", "boolean": "true, false", "array": "list", "object": "mapping"}[field["type"]]


TABLES = [
    ("Model", ModelConfig),
    ("Application", ServeConfig),
    ("Router", RouterConfig),
    ("Latency class", LatencyClassConfig),
    ("Rule", RuleConfig),
    ("Escalation", EscalationConfig),
    ("Cost weights", CostWeights),
]


@pytest.mark.parametrize(("heading", "model"), TABLES)
def test_page_lists_every_field_with_its_default_and_limits(heading: str, model: type[BaseModel]) -> None:
    assert documented(heading) == defined(model)


def test_example_on_the_page_is_a_valid_configuration() -> None:
    example = PAGE.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    config = ServeConfig.model_validate(yaml.safe_load(example))
    assert [model.name for model in config.models] == ["chat", "Qwen3-0.6B"]
    assert config.models[0].kv_cache_memory == 20 * 2**30


def test_every_field_has_a_flag_unless_the_page_says_otherwise() -> None:
    serve = typer.main.get_command(cli).commands["serve"]
    flags = {flag for parameter in serve.params for flag in parameter.opts if flag.startswith("--")}
    without_flag = {"model", "models", "max_body_bytes", "router"}
    fields = (ModelConfig.model_fields.keys() | ServeConfig.model_fields.keys()) - without_flag
    assert flags - {"--config"} == {"--" + field.replace("_", "-") for field in fields}
    assert "max_body_bytes` | 8388608 | more than 0 | Larger request bodies are refused with status 413. No flag" in (
        PAGE.read_text(encoding="utf-8")
    )
